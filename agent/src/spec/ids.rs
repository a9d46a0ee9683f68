//! `linux.uidMappings` and `linux.gidMappings`, and those of a mount.

use oci_spec::runtime::LinuxIdMapping;

use crate::error::{Error, Result};

/// The kernel's bound for the lines of a map (user_namespaces(7)).
const MAX_LINES: usize = 340;

/// A map from the ids of a user namespace to the guest's. Never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMap(Vec<LinuxIdMapping>);

/// The two maps of a user namespace, or of a mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMaps {
    /// Users.
    pub uids: IdMap,
    /// Groups.
    pub gids: IdMap,
}

impl IdMaps {
    /// Checks a pair of maps; none if both are absent or empty. `field` is the object that holds them.
    pub(super) fn from_spec(
        uids: Option<&[LinuxIdMapping]>,
        gids: Option<&[LinuxIdMapping]>,
        field: &str,
    ) -> Result<Option<Self>> {
        let (uids, gids) = (uids.unwrap_or_default(), gids.unwrap_or_default());
        if uids.is_empty() && gids.is_empty() {
            return Ok(None);
        }
        Ok(Some(Self {
            uids: IdMap::from_spec(uids, &format!("{field}.uidMappings"))?,
            gids: IdMap::from_spec(gids, &format!("{field}.gidMappings"))?,
        }))
    }
}

impl IdMap {
    fn from_spec(lines: &[LinuxIdMapping], field: &str) -> Result<Self> {
        if lines.is_empty() {
            return Err(Error::spec(field, "is missing beside the other map"));
        }
        if lines.len() > MAX_LINES {
            return Err(Error::spec(
                field,
                format!("has more than {MAX_LINES} entries"),
            ));
        }
        for (index, line) in lines.iter().enumerate() {
            let ends =
                [line.container_id(), line.host_id()].map(|first| first.checked_add(line.size()));
            if line.size() == 0 || ends.contains(&None) {
                return Err(Error::spec(
                    format!("{field}[{index}].size"),
                    "must be at least 1 and end within 32 bits",
                ));
            }
        }
        Ok(Self(lines.to_vec()))
    }

    /// The guest's id behind one of the namespace's.
    pub fn outside(&self, inside: u32) -> Option<u32> {
        self.0.iter().find_map(|line| {
            let offset = inside.checked_sub(line.container_id())?;
            (offset < line.size()).then(|| line.host_id() + offset)
        })
    }

    /// The text for `/proc/PID/uid_map`.
    pub fn text(&self) -> String {
        self.0
            .iter()
            .map(|line| {
                format!(
                    "{} {} {}\n",
                    line.container_id(),
                    line.host_id(),
                    line.size()
                )
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn map(json: Value) -> Result<IdMap> {
        IdMap::from_spec(&serde_json::from_value::<Vec<_>>(json).unwrap(), "map")
    }

    #[test]
    fn ids_are_found_in_the_line_that_holds_them() {
        let map = map(json!([
            {"containerID": 0, "hostID": 1000, "size": 1},
            {"containerID": 1, "hostID": 100_000, "size": 10}
        ]))
        .unwrap();
        for (inside, outside) in [
            (0, Some(1000)),
            (1, Some(100_000)),
            (10, Some(100_009)),
            (11, None),
        ] {
            assert_eq!(map.outside(inside), outside);
        }
        assert_eq!(map.text(), "0 1000 1\n1 100000 10\n");
    }

    #[test]
    fn maps_that_no_kernel_takes_are_refused() {
        let line = json!({"containerID": 0, "hostID": 0, "size": 1});
        for bad in [
            json!([]),
            json!([{"containerID": 0, "hostID": 0, "size": 0}]),
            json!([{"containerID": u32::MAX, "hostID": 0, "size": 2}]),
            json!(vec![line; MAX_LINES + 1]),
        ] {
            assert!(map(bad).is_err());
        }
    }
}
