//! config.json as such: its form, and what it may hold that nobody knows.

use oci_spec::runtime as oci;

use crate::error::{Error, Result};
use crate::json_path;

/// Parses config.json. Capabilities that nobody knows are dropped with a warning, as the spec asks
/// (config.md, "Linux process": "Runtimes SHOULD NOT fail").
pub(super) fn parse(json: &[u8]) -> Result<oci::Spec> {
    let error = match serde_json::from_slice(json) {
        Ok(spec) => return Ok(spec),
        Err(error) => error,
    };
    if error.is_data()
        && json
            .windows(CAPABILITY.len())
            .any(|window| window == CAPABILITY)
    {
        // Perhaps an unknown capability; the slow way, taken for such specs only.
        let mut value = serde_json::from_slice(json).map_err(|error| broken(json, &error))?;
        drop_unknown_capabilities(&mut value);
        let cleaned = value.to_string();
        return serde_json::from_str(&cleaned).map_err(|error| broken(cleaned.as_bytes(), &error));
    }
    Err(broken(json, &error))
}

const CAPABILITY: &[u8] = b"\"CAP_";

fn broken(json: &[u8], error: &serde_json::Error) -> Error {
    if !error.is_data() {
        return Error::Request(format!("spec_json is not JSON: {error}"));
    }
    let field = json_path::path_at(json, error.line(), error.column());
    // Without the position, which means nothing to somebody who wrote another file than this one.
    let text = error.to_string();
    let problem = text
        .rsplit_once(" at line ")
        .map_or(text.as_str(), |(problem, _)| problem);
    Error::spec(
        if field.is_empty() {
            "config.json"
        } else {
            &field
        },
        problem,
    )
}

fn drop_unknown_capabilities(spec: &mut serde_json::Value) {
    let Some(sets) = spec
        .pointer_mut("/process/capabilities")
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
