//! config.json as such: its form, and what it may hold that nobody knows.

use bulkhead_protocol::scheduler_flag;
use oci_spec::runtime as oci;

use crate::error::{Error, Result};
use crate::json_path;

/// Parses config.json. Capabilities that nobody knows are dropped with a warning, as the spec asks
/// (config.md, "Linux process": "Runtimes SHOULD NOT fail").
pub(super) fn parse(json: &[u8]) -> Result<oci::Spec> {
    parse_as(json, &SPEC)
}

/// Parses a `process` that stands alone, in the same way. Messages name its fields as in config.json.
pub(super) fn parse_process(json: &[u8]) -> Result<oci::Process> {
    parse_as(json, &PROCESS)
}

/// Parses a `linux.resources` that stands alone.
pub fn parse_resources(json: &[u8]) -> Result<oci::LinuxResources> {
    parse_as(json, &RESOURCES)
}

/// Where a document stands in config.json.
struct Document {
    /// Of the request.
    name: &'static str,
    /// How its own name is shown.
    whole: &'static str,
    /// What its fields' names begin with.
    prefix: &'static str,
    /// JSON pointer to the capabilities.
    capabilities: &'static str,
    /// JSON pointer to the scheduler's flags.
    scheduler_flags: &'static str,
}

const SPEC: Document = Document {
    name: "spec_json",
    whole: "config.json",
    prefix: "",
    capabilities: "/process/capabilities",
    scheduler_flags: "/process/scheduler/flags",
};

const PROCESS: Document = Document {
    name: "process_json",
    whole: "process",
    prefix: "process.",
    capabilities: "/capabilities",
    scheduler_flags: "/scheduler/flags",
};

const RESOURCES: Document = Document {
    name: "resources_json",
    whole: "linux.resources",
    prefix: "linux.resources.",
    capabilities: NOWHERE,
    scheduler_flags: NOWHERE,
};

/// Pointer to what a document has not: no property of the spec has this name.
const NOWHERE: &str = "/-";

fn parse_as<T: serde::de::DeserializeOwned>(json: &[u8], document: &Document) -> Result<T> {
    let error = match serde_json::from_slice(json) {
        Ok(spec) => return Ok(spec),
        Err(error) => error,
    };
    let holds = |text: &[u8]| json.windows(text.len()).any(|window| window == text);
    if error.is_data() && (holds(CAPABILITY) || holds(SCHEDULER_FLAG)) {
        // Perhaps one of the names that are mended below; the slow way, taken for such specs only.
        let mut value =
            serde_json::from_slice(json).map_err(|error| broken(json, &error, document))?;
        drop_unknown_capabilities(&mut value, document);
        rename_scheduler_flags(&mut value, document);
        let cleaned = value.to_string();
        return serde_json::from_str(&cleaned)
            .map_err(|error| broken(cleaned.as_bytes(), &error, document));
    }
    Err(broken(json, &error, document))
}

const CAPABILITY: &[u8] = b"\"CAP_";
const SCHEDULER_FLAG: &[u8] = b"\"SCHED_FLAG_";

fn broken(json: &[u8], error: &serde_json::Error, document: &Document) -> Error {
    if !error.is_data() {
        return Error::Request(format!("{} is not JSON: {error}", document.name));
    }
    let field = json_path::path_at(json, error.line(), error.column());
    // serde quotes the offending value, and arguments and environment, of hooks too, are nobody's business.
    if holds_secrets(&field) {
        return Error::spec(format!("{}{field}", document.prefix), "must hold strings");
    }
    // Without the position, which means nothing to somebody who wrote another file than this one.
    let text = error.to_string();
    let problem = text
        .rsplit_once(" at line ")
        .map_or(text.as_str(), |(problem, _)| problem);
    let field = if field.is_empty() {
        document.whole.to_owned()
    } else {
        format!("{}{field}", document.prefix)
    };
    Error::spec(field, problem)
}

/// Whether a field is a program's arguments or environment, or in them.
fn holds_secrets(field: &str) -> bool {
    let mut names = field.split(['.', '[']);
    names.any(|name| name == "args" || name == "env")
}

fn drop_unknown_capabilities(value: &mut serde_json::Value, document: &Document) {
    let Some(sets) = value
        .pointer_mut(document.capabilities)
        .and_then(|sets| sets.as_object_mut())
    else {
        return;
    };
    for names in sets.values_mut().filter_map(|names| names.as_array_mut()) {
        names.retain(|name| {
            let known = serde_json::from_value::<oci::Capability>(name.clone()).is_ok();
            if !known {
                tracing::warn!(%name, "process.capabilities: ignoring an unknown capability");
            }
            known
        });
    }
}

fn rename_scheduler_flags(value: &mut serde_json::Value, document: &Document) {
    let flags = value
        .pointer_mut(document.scheduler_flags)
        .and_then(|flags| flags.as_array_mut());
    for flag in flags.into_iter().flatten() {
        if let Some(name) = flag.as_str() {
            *flag = scheduler_flag(name).into();
        }
    }
}
