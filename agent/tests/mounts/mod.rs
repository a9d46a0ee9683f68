//! Mounts where the image, the volumes or the container itself would have them lead elsewhere or do more.

use std::fs;

use serde_json::json;

use crate::bed::Bed;

pub async fn the_propagation_of_a_mount_is_its_own_whatever_the_roots() {
    let bed = Bed::new().await;
    let script = "while read -r id parent device root place rest; do case $place in /|/data) echo $place $rest;; esac; \
                  done < /proc/self/mountinfo";
    let mut spec = bed.spec(script);
    let volume = bed.dir().join("volume");
    fs::create_dir(&volume).unwrap();
    spec["mounts"].as_array_mut().unwrap().push(json!(
        {"destination": "/data", "source": volume, "options": ["bind", "shared"]}
    ));
    for (root, root_is_shared) in [
        (None, false),
        (Some("rprivate"), false),
        (Some("rslave"), false),
        (Some("shared"), true),
    ] {
        if let Some(root) = root {
            spec["linux"]["rootfsPropagation"] = json!(root);
        }
        let output = bed.output(&spec).await;
        let shared = |place: &str| {
            let line = output
                .lines()
                .find(|line| line.starts_with(&format!("{place} ")));
            line.unwrap().contains(" shared:")
        };
        assert!(shared("/data"), "{root:?}: {output}");
        assert_eq!(shared("/"), root_is_shared, "{root:?}: {output}");
    }
}

pub async fn what_is_mounted_below_a_read_only_path_stays_writable() {
    let bed = Bed::new().await;
    let mut spec = bed.spec("touch /data/x 2>&1; touch /data/below/x && echo written");
    let mounts = spec["mounts"].as_array_mut().unwrap();
    for place in ["/data", "/data/below"] {
        mounts.push(json!({"destination": place, "type": "tmpfs", "source": "tmpfs"}));
    }
    spec["linux"]["readonlyPaths"] = json!(["/data"]);
    assert_eq!(
        bed.output(&spec).await,
        "touch: /data/x: Read-only file system\nwritten\n"
    );
}
