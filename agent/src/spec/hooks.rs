//! `hooks`: of the six kinds, startContainer's run in the guest.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use oci_spec::runtime as oci;

use super::process::environment;
use crate::error::{Error, Result};

/// `hooks.startContainer`, and what the state says that they get.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct StartHooks {
    /// In their order.
    pub list: Vec<Hook>,
    /// `ociVersion`.
    pub version: String,
    /// The bundle on the host; the request's, not the spec's.
    pub bundle: String,
    /// `annotations`.
    pub annotations: HashMap<String, String>,
}

/// One hook.
#[derive(Debug, PartialEq, Eq)]
pub struct Hook {
    /// The program, in the container.
    pub path: PathBuf,
    /// Its arguments, the name first.
    pub args: Vec<String>,
    /// Its environment; none is that of the container's process.
    pub env: Option<Vec<(String, String)>>,
    /// How long it may take.
    pub timeout: Option<Duration>,
}

impl StartHooks {
    /// Checks the hooks; refuses those of the host.
    pub(super) fn from_spec(spec: &oci::Spec) -> Result<Self> {
        let Some(hooks) = spec.hooks() else {
            return Ok(Self::default());
        };
        #[allow(deprecated)]
        let hosts = [
            ("prestart", hooks.prestart()),
            ("createRuntime", hooks.create_runtime()),
            ("createContainer", hooks.create_container()),
            ("poststart", hooks.poststart()),
            ("poststop", hooks.poststop()),
        ];
        for (name, list) in hosts {
            if list.as_ref().is_some_and(|list| !list.is_empty()) {
                return Err(Error::spec(
                    format!("hooks.{name}"),
                    "these hooks are the host's to run; remove them",
                ));
            }
        }
        let list = hooks.start_container().iter().flatten().enumerate();
        Ok(Self {
            list: list
                .map(|(index, hook)| self::hook(hook, &format!("hooks.startContainer[{index}]")))
                .collect::<Result<_>>()?,
            version: spec.version().clone(),
            bundle: String::new(),
            annotations: spec.annotations().clone().unwrap_or_default(),
        })
    }
}

fn hook(hook: &oci::Hook, field: &str) -> Result<Hook> {
    if !hook.path().is_absolute() {
        return Err(Error::spec(format!("{field}.path"), "must be absolute"));
    }
    let timeout = match hook.timeout() {
        None => None,
        Some(seconds) => match u64::try_from(seconds) {
            Ok(seconds) if seconds > 0 => Some(Duration::from_secs(seconds)),
            _ => {
                return Err(Error::spec(
                    format!("{field}.timeout"),
                    "must be at least a second",
                ));
            }
        },
    };
    Ok(Hook {
        path: hook.path().clone(),
        args: hook.args().clone().unwrap_or_default(),
        env: hook
            .env()
            .as_ref()
            .map(|env| environment(env, &format!("{field}.env")))
            .transpose()?,
        timeout,
    })
}
