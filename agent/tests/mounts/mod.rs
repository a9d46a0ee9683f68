//! Mounts where the image, the volumes or the container itself would have them lead elsewhere or do more.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, symlink};

use bulkhead_agent::sys::watch_fd;
use bulkhead_protocol::agent::{CreateContainerRequest, MountBelow, Stdio};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use ttrpc::Code;
use ttrpc::context::Context;

use crate::bed::Bed;
use crate::in_user_namespace;

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

pub async fn what_is_mounted_below_a_volume_is_not_found_through_its_links() {
    let bed = Bed::new().await;
    let (volume, secret) = (bed.dir().join("volume"), bed.dir().join("secret"));
    fs::create_dir_all(secret.join("inner")).unwrap();
    fs::write(secret.join("inner/file"), "secret").unwrap();
    fs::create_dir_all(volume.join("real/inner")).unwrap();
    symlink("real", volume.join("inside")).unwrap();
    symlink(&secret, volume.join("outside")).unwrap();
    let mut spec = bed.spec("cat /data/*/inner/file");
    let mounts = spec["mounts"].as_array_mut().unwrap();
    let index = mounts.len() as u32;
    mounts.push(json!({"destination": "/data", "source": volume, "options": ["rbind"]}));
    for (path, allowed) in [
        ("real/inner", true),
        ("outside/inner", false),
        ("outside", false),
        ("inside/inner", false),
    ] {
        let request = CreateContainerRequest {
            container_id: "box".to_owned(),
            spec_json: serde_json::to_vec(&spec).unwrap(),
            stdio: Some(Stdio::default()).into(),
            mounts_below: vec![MountBelow {
                mount: index,
                path: path.into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let created = bed
            .client
            .create_container(Context::default(), &request)
            .await;
        match created {
            Ok(_) if allowed => bed.delete("box").await.unwrap(),
            Ok(_) => panic!("{path}: made"),
            Err(error) => {
                assert!(!allowed, "{path}: {error}");
                let error = error.to_string();
                assert!(error.contains(&format!("volume/{path}: ")), "{error}");
            }
        }
    }
}

pub async fn a_proc_that_is_a_link_is_refused_however_it_is_spelled() {
    let bed = Bed::new().await;
    fs::create_dir(bed.rootfs().join("data/sys")).unwrap();
    symlink("data", bed.rootfs().join("proc")).unwrap();
    for place in ["/proc/", "/proc/.", "//proc//", "/proc/sys/.."] {
        let mut spec = bed.spec("true");
        spec["mounts"][0]["destination"] = json!(place);
        let refused = bed.create("box", &spec, Stdio::default()).await;
        let message = format!("mounts[0] ({place}): proc must be mounted on ordinary directory");
        assert_eq!(refused, Err((Code::INVALID_ARGUMENT, message)));
    }
}

pub async fn the_guests_null_device_cannot_be_changed_through_its_copies() {
    let bed = Bed::new().await;
    // To what it is already: a test that fails must not change this machine's.
    let mut spec = bed.spec(
        "for place in /proc/keys /data/null; do /bin/busybox chmod 666 $place 2>&1; echo x > $place && echo written; \
         done",
    );
    fs::write(bed.rootfs().join("data/null"), "").unwrap();
    spec["mounts"].as_array_mut().unwrap().push(
        json!({"destination": "/data/null", "source": "/dev/null", "options": ["bind", "rw"]}),
    );
    assert_eq!(
        bed.output(&spec).await,
        "chmod: /proc/keys: Read-only file system\nwritten\n\
         chmod: /data/null: Read-only file system\nwritten\n"
    );
}

pub async fn a_multiplexer_of_terminals_among_the_devices_is_passed_over() {
    let bed = Bed::new().await;
    let script = "readlink /dev/ptmx";
    for mut spec in [bed.spec(script), in_user_namespace(&bed, script)] {
        spec["linux"]["devices"] =
            json!([{"path": "/dev/ptmx", "type": "c", "major": 5, "minor": 2, "fileMode": 0o666}]);
        assert_eq!(bed.output(&spec).await, "pts/ptmx\n");
    }
}

/// A file system of the kernel's FUSE that says it is there and leaves every further request unanswered.
struct Slow {
    device: AsyncFd<fs::File>,
    place: tempfile::TempDir,
}

impl Slow {
    async fn mount() -> Self {
        let device = fs::File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/fuse")
            .unwrap();
        let place = tempfile::tempdir().unwrap();
        let fd = device.as_raw_fd();
        let options = format!("fd={fd},rootmode=40000,user_id=0,group_id=0");
        mount(
            Some("slow"),
            place.path(),
            Some("fuse"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .unwrap();
        let device = watch_fd(device, Interest::READABLE).unwrap();
        let slow = Self { device, place };
        let request = slow.request().await;
        // struct fuse_out_header and struct fuse_init_out (linux/fuse.h): the request's number, version 7.31, nothing offered.
        let mut answer = [0; 16 + 64];
        answer[0] = 16 + 64;
        answer[8..16].copy_from_slice(&request[8..16]);
        (answer[16], answer[20]) = (7, 31);
        slow.device.get_ref().write_all(&answer).unwrap();
        slow
    }

    /// Waits for the next request.
    async fn request(&self) -> Vec<u8> {
        let mut request = vec![0; 1 << 17];
        let length = self
            .device
            .async_io(Interest::READABLE, |mut device| device.read(&mut request))
            .await
            .unwrap();
        request.truncate(length);
        request
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        umount2(self.place.path(), MntFlags::MNT_DETACH).unwrap();
    }
}

pub async fn a_slow_volume_holds_up_nobody_but_its_container() {
    let slow = Slow::mount().await;
    let source = slow.place.path().join("volume");
    let bed = Bed::new().await;
    bed.running("other").await;
    let mut spec = in_user_namespace(&bed, "true");
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(json!({"destination": "/data", "source": source, "options": ["bind"]}));
    let meanwhile = async {
        slow.request().await;
        let processes = bed.processes("other").await.unwrap();
        assert_eq!(processes.len(), 1);
        // Fails what it has not answered.
        drop(slow);
    };
    let create = bed.create("box", &spec, Stdio::default());
    let (created, ()) = tokio::join!(create, meanwhile);
    let (_, message) = created.unwrap_err();
    assert!(message.contains("source "), "{message}");
}
