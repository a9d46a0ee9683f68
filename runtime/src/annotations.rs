//! Annotations of a bundle that are meant for this runtime: `io.bulkhead.*`.
//!
//! They size the guest and help to debug it. None chooses a file or a program of the host: whoever may write annotations need
//! not be trusted with those.
//!
//! | annotation | value |
//! | --- | --- |
//! | `io.bulkhead.vcpus` | number of vCPUs, 1 to 32, at most the host's processors |
//! | `io.bulkhead.memory_mib` | the guest's memory in MiB, at least 64, at most the host's |
//! | `io.bulkhead.kernel_arguments` | words for the end of the guest kernel's command line |

use oci_spec::runtime::Spec;

use crate::sizing;
use crate::spec::SpecError;

/// How our annotations begin.
const PREFIX: &str = "io.bulkhead.";

/// Longest addition to the kernel's command line.
const MAX_KERNEL_ARGUMENTS: usize = 512;

/// What the annotations of a bundle override.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// Number of vCPUs.
    pub vcpus: Option<u8>,
    /// The guest's memory in MiB.
    pub memory_mib: Option<u64>,
    /// Words for the end of the kernel's command line.
    pub kernel_arguments: String,
}

impl Overrides {
    /// Reads a spec's annotations; one of ours that is unknown or has a wrong value is an error.
    pub fn of(spec: &Spec) -> Result<Self, SpecError> {
        let mut this = Self::default();
        for (name, value) in spec.annotations().iter().flatten() {
            let Some(own) = name.strip_prefix(PREFIX) else {
                continue;
            };
            let wrong = |right: String| {
                SpecError::field(
                    format!("annotations[{name:?}]"),
                    format!("is {value:?}: give {right}"),
                )
            };
            match own {
                "vcpus" => {
                    let most = sizing::host_cpus();
                    let vcpus = value.parse().ok().filter(|n| (1..=most).contains(n));
                    let right = || format!("a number from 1 to {most}, the host's processors");
                    this.vcpus = Some(vcpus.ok_or_else(|| wrong(right()))?);
                }
                "memory_mib" => {
                    let (least, most) = (sizing::MIN_MEMORY_MIB, sizing::most_memory_mib());
                    let memory = value.parse().ok().filter(|n| (least..=most).contains(n));
                    let right = || {
                        format!(
                            "a number of MiB, at least {least} and at most {most}, the host's memory"
                        )
                    };
                    this.memory_mib = Some(memory.ok_or_else(|| wrong(right()))?);
                }
                "kernel_arguments" => {
                    let printable = value.bytes().all(|byte| (b' '..=b'~').contains(&byte));
                    if !printable || value.len() > MAX_KERNEL_ARGUMENTS {
                        return Err(SpecError::field(
                            format!("annotations[{name:?}]"),
                            format!(
                                "must be at most {MAX_KERNEL_ARGUMENTS} printable ASCII characters"
                            ),
                        ));
                    }
                    this.kernel_arguments.clone_from(value);
                }
                _ => {
                    return Err(SpecError::field(
                        format!("annotations[{name:?}]"),
                        "is unknown: this runtime has io.bulkhead.vcpus, io.bulkhead.memory_mib and \
                         io.bulkhead.kernel_arguments",
                    ));
                }
            }
        }
        Ok(this)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overrides(annotations: &str) -> Result<Overrides, String> {
        let spec = format!(r#"{{"ociVersion":"1.0.2","annotations":{annotations}}}"#);
        Overrides::of(&serde_json::from_str(&spec).unwrap()).map_err(|e| e.to_string())
    }

    #[test]
    fn ours_are_read_and_others_are_left_alone() {
        let found = overrides(
            r#"{"io.bulkhead.vcpus":"1","io.bulkhead.memory_mib":"96","io.bulkhead.kernel_arguments":"loglevel=7","x":"y"}"#,
        );
        let expected = Overrides {
            vcpus: Some(1),
            memory_mib: Some(96),
            kernel_arguments: "loglevel=7".into(),
        };
        assert_eq!(found, Ok(expected));
        assert_eq!(overrides("{}"), Ok(Overrides::default()));
    }

    #[test]
    fn unknown_ones_and_wrong_values_are_refused_by_name() {
        for (annotation, expected) in [
            (
                r#"{"io.bulkhead.vcpu":"1"}"#,
                "annotations[\"io.bulkhead.vcpu\"]` is unknown",
            ),
            (
                r#"{"io.bulkhead.vcpus":"0"}"#,
                "is \"0\": give a number from 1 to",
            ),
            (r#"{"io.bulkhead.vcpus":"many"}"#, "is \"many\""),
            (r#"{"io.bulkhead.memory_mib":"63"}"#, "at least 64"),
            (
                r#"{"io.bulkhead.memory_mib":"17592186044417"}"#,
                "the host's memory",
            ),
            (r#"{"io.bulkhead.kernel_arguments":"a\nb"}"#, "printable"),
        ] {
            let message = overrides(annotation).unwrap_err();
            assert!(message.contains(expected), "{annotation}: {message}");
        }
    }
}
