//! The container's files: its root, volumes and other mounts, and what the host sees of them.

#![allow(clippy::unwrap_used)]

use std::ffi::{CStr, CString, OsStr};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use bulkhead_e2e::bundle::Bundle;
use bulkhead_e2e::command::{
    assert_same_as_runc, bulkhead, finish, run, run_command, runc, start, wait,
};
use bulkhead_e2e::container::Container;
use bulkhead_e2e::leaks::Host;
use bulkhead_e2e::processes;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;

#[test]
fn files_of_the_bundle_are_read_and_written_back() {
    let _unchanged = Host::unchanged();
    let bundle = Bundle::shell(
        "cat /given && echo from the guest > /made && mkdir /folder && ln -s made /folder/link && chmod 640 /made",
    );
    fs::write(bundle.in_root("given"), "from the host\n").unwrap();
    let ended = run(&bundle).expect_code(0);
    assert_eq!(ended.stdout, "from the host\n");
    assert_eq!(
        fs::read_to_string(bundle.in_root("made")).unwrap(),
        "from the guest\n"
    );
    assert_eq!(
        fs::metadata(bundle.in_root("made")).unwrap().mode() & 0o7777,
        0o640
    );
    assert_eq!(
        fs::read_link(bundle.in_root("folder/link"))
            .unwrap()
            .to_str(),
        Some("made")
    );
}

/// Gives a file an access control list (acl(5)) in which a user has rights that the owning group has not.
fn give_access(path: &Path, attribute: &CStr, user: u32) {
    const NOBODY: u32 = u32::MAX;
    let entries: [(u16, u16, u32); 5] = [
        (0x01, 6, NOBODY), // the owner
        (0x02, 6, user),
        (0x04, 0, NOBODY), // the owning group
        (0x10, 6, NOBODY), // the mask
        (0x20, 0, NOBODY), // others
    ];
    let mut list = 2u32.to_le_bytes().to_vec();
    for (tag, rights, id) in entries {
        list.extend(tag.to_le_bytes());
        list.extend(rights.to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: two C strings, and a buffer of the length given; the kernel only reads them.
    let done = unsafe {
        let (value, len) = (list.as_ptr().cast(), list.len());
        libc::setxattr(path.as_ptr(), attribute.as_ptr(), value, len, 0)
    };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn access_control_lists_hold_as_under_runc() {
    let _unchanged = Host::unchanged();
    let script = "cat /given; echo $?; (: >>/given) 2>/dev/null; echo $?; touch /folder/made; stat -c %a /folder/made; cat /plain";
    let mut bundle = Bundle::shell(script);
    for (name, mode) in [("given", 0o660), ("plain", 0o640), ("folder", 0o777)] {
        let path = bundle.in_root(name);
        if name == "folder" {
            fs::create_dir(&path).unwrap();
        } else {
            fs::write(&path, format!("{name}\n")).unwrap();
        }
        std::os::unix::fs::chown(&path, Some(0), Some(100)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }
    give_access(&bundle.in_root("given"), c"system.posix_acl_access", 4242);
    give_access(&bundle.in_root("folder"), c"system.posix_acl_default", 4242);
    for user in [1000, 4242] {
        bundle.config["process"]["user"] = json!({"uid": user, "gid": 100});
        fs::write(bundle.in_root("given"), "given\n").unwrap();
        let _ = fs::remove_file(bundle.in_root("folder/made"));
        assert_same_as_runc(&bundle);
    }
}

#[test]
fn what_the_hosts_kernel_makes_up_is_read_whole() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::shell("cat /host/version /host/sys/kernel/osrelease /filesystems");
    bundle.config["mounts"].as_array_mut().unwrap().extend([
        json!({"destination": "/host", "type": "bind", "source": "/proc", "options": ["bind", "ro"]}),
        json!({"destination": "/filesystems", "type": "bind", "source": "/proc/filesystems", "options": ["bind", "ro"]}),
    ]);
    assert_same_as_runc(&bundle);
}

#[test]
fn mounts_of_the_config_are_there() {
    let _unchanged = Host::unchanged();
    let volume = tempfile::tempdir().unwrap();
    fs::write(volume.path().join("shared"), "volume\n").unwrap();
    let mut bundle = Bundle::shell(
        "cat /volume/shared /one-file; echo written > /volume/new; echo no > /fixed/new; echo $?; \
         stat -f -c %T /scratch; stat -c %a /scratch; grep -c ' /scratch ' /proc/mounts",
    );
    let mounts = bundle.config["mounts"].as_array_mut().unwrap();
    mounts.push(
        json!({"destination": "/volume", "source": volume.path(), "options": ["rbind", "rw"]}),
    );
    mounts.push(
        json!({"destination": "/fixed", "source": volume.path(), "options": ["rbind", "ro"]}),
    );
    mounts.push(json!({"destination": "/one-file", "source": volume.path().join("shared"), "options": ["bind", "ro"]}));
    mounts.push(json!({"destination": "/scratch", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1750", "size=1m"]}));
    assert_same_as_runc(&bundle);
    assert_eq!(
        fs::read_to_string(volume.path().join("new")).unwrap(),
        "written\n"
    );
}

/// A tmpfs on the host, unmounted when it goes.
struct Mounted(PathBuf);

impl Mounted {
    fn on(place: PathBuf, flags: MsFlags) -> Self {
        fs::create_dir(&place).unwrap();
        mount(Some("e2e"), &place, Some("tmpfs"), flags, None::<&str>).unwrap();
        Self(place)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn what_is_mounted_below_a_volume_is_a_mount_of_the_container_too() {
    let _unchanged = Host::unchanged();
    let volume = tempfile::tempdir().unwrap();
    let noexec = Mounted::on(volume.path().join("a noexec"), MsFlags::MS_NOEXEC);
    // A name that is no UTF-8.
    let below = noexec.0.join(OsStr::from_bytes(b"below\xff"));
    let _below = Mounted::on(below, MsFlags::MS_NOATIME);
    let _fixed = Mounted::on(volume.path().join("fixed"), MsFlags::MS_RDONLY);
    for options in [
        &["rbind", "ro"][..],
        &["rbind", "rprivate"],
        &["rbind", "rro", "rnosuid", "rnoatime"],
        &["bind", "ro"],
    ] {
        let mut bundle = Bundle::shell(
            "awk '$5 ~ \"^/volume/\" {print $5, $6}' /proc/self/mountinfo; cd /volume; \
             for place in . 'a noexec' 'a noexec'/below* fixed; do touch \"$place/x\"; echo $?; rm -f \"$place/x\"; done",
        );
        let mount = json!({"destination": "/volume", "source": volume.path(), "options": options});
        bundle.config["mounts"].as_array_mut().unwrap().push(mount);
        assert_same_as_runc(&bundle);
    }
}

#[test]
fn what_the_host_mounts_below_a_volume_later_is_seen_where_its_propagation_asks_for_it() {
    let _unchanged = Host::unchanged();
    let folder = tempfile::tempdir().unwrap();
    let volume = Mounted::on(folder.path().join("volume"), MsFlags::empty());
    let none = None::<&str>;
    mount(none, &volume.0, none, MsFlags::MS_SHARED, none).unwrap();
    for runtime in [runc(), bulkhead()] {
        let mut bundle = Bundle::idle();
        for (place, options) in [
            ("/private", ["rbind", "rprivate", "ro"]),
            ("/slave", ["rbind", "rslave", "ro"]),
        ] {
            let mount = json!({"destination": place, "type": "bind", "source": volume.0, "options": options});
            bundle.config["mounts"].as_array_mut().unwrap().push(mount);
        }
        let container = Container::running(runtime, &bundle);
        let later = Mounted::on(volume.0.join("later"), MsFlags::empty());
        fs::write(later.0.join("file"), "of the host").unwrap();
        let ended = container.shell("cd /; ls -d */later/file; ls -d */later");
        assert_eq!(
            ended.stdout,
            "slave/later/file\nprivate/later\nslave/later\n"
        );
        let namespace = format!("--mount=/proc/{}/ns/mnt", container.pid);
        let list = ["/bin/sh", "-c", "cd /; ls -d */later/file"];
        let ended = finish(Command::new("nsenter").arg(namespace).args(list));
        assert_eq!(ended.stdout, "slave/later/file\n", "{ended:?}");
        let place = later.0.clone();
        drop(later);
        fs::remove_dir(place).unwrap();
    }
}

#[test]
fn a_volume_has_the_attributes_of_the_mount_it_is_of() {
    let _unchanged = Host::unchanged();
    let dir = tempfile::tempdir().unwrap();
    let all = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_NODIRATIME;
    let source = Mounted::on(dir.path().join("source"), all);
    fs::copy("/bin/busybox", source.0.join("busybox")).unwrap();
    for (source, options) in [
        (source.0.clone(), &["rbind", "rprivate"][..]),
        (source.0.clone(), &["rbind", "exec", "suid"]),
        (source.0.clone(), &["bind", "ro"]),
        (source.0.clone(), &["bind", "nosuid", "noatime"]),
        (source.0.clone(), &["rbind", "rexec"]),
        (source.0.join("busybox"), &["bind"]),
    ] {
        let mut bundle = Bundle::shell(
            "awk '$5 == \"/volume\" {print $6}' /proc/self/mountinfo; \
             for program in /volume /volume/busybox; do $program true 2>&1; echo $?; done",
        );
        let mount = json!({"destination": "/volume", "source": source, "options": options});
        bundle.config["mounts"].as_array_mut().unwrap().push(mount);
        assert_same_as_runc(&bundle);
    }
}

#[test]
fn the_root_has_the_attributes_of_the_mount_it_is_of() {
    let _unchanged = Host::unchanged();
    for (flags, read_only) in [
        (MsFlags::MS_NODEV | MsFlags::MS_NOSUID, false),
        (MsFlags::MS_NODEV | MsFlags::MS_NOSUID, true),
        (MsFlags::MS_NOEXEC, false),
    ] {
        let mut bundle = Bundle::shell(
            "awk '$5 == \"/\" {print $6}' /proc/self/mountinfo; mknod /tmp/k c 1 3; cat /tmp/k 2>&1; echo $?",
        );
        let root = bundle.in_root("/");
        let outside = bundle.path().join("outside");
        fs::rename(&root, &outside).unwrap();
        let _mounted = Mounted::on(root.clone(), flags);
        let copied = Command::new("cp")
            .arg("-aT")
            .arg(&outside)
            .arg(&root)
            .status();
        assert!(copied.unwrap().success());
        bundle.config["root"]["readonly"] = json!(read_only);
        for set in ["bounding", "effective", "permitted"] {
            bundle.config["process"]["capabilities"][set] = json!(["CAP_MKNOD"]);
        }
        assert_same_as_runc(&bundle);
    }
}

#[test]
fn the_usual_devices_can_be_volumes() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::shell(
        "wc -c < /etc/group; head -c 3 /etc/zero | wc -c; echo x > /etc/group; echo $?; \
         for d in /etc/group /etc/zero; do stat -c '%t %T %a %F' $d; done; grep -c ' /etc/' /proc/self/mountinfo",
    );
    let mounts = bundle.config["mounts"].as_array_mut().unwrap();
    for (source, destination) in [("/dev/null", "/etc/group"), ("/dev/zero", "/etc/zero")] {
        let options = ["rbind", "rprivate", "ro"];
        mounts.push(json!({"destination": destination, "source": source, "options": options}));
    }
    assert_same_as_runc(&bundle);
}

#[test]
fn a_read_only_root_refuses_writes() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::shell("touch /x; echo $?; touch /dev/shm/x; echo $?");
    bundle.config["root"]["readonly"] = json!(true);
    assert_same_as_runc(&bundle);
}

#[test]
fn masked_and_read_only_paths_hold() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::shell(
        "ls /masked-dir; wc -c < /masked-file; touch /fixed-dir/x; echo $?; echo 1 > /proc/sys/kernel/domainname; echo $?",
    );
    for (path, content) in [
        ("masked-file", Some("secret")),
        ("masked-dir/secret", Some("")),
        ("fixed-dir", None),
    ] {
        let path = bundle.in_root(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        match content {
            Some(content) => fs::write(path, content).unwrap(),
            None => fs::create_dir(path).unwrap(),
        }
    }
    bundle.config["linux"]["maskedPaths"] =
        json!(["/masked-file", "/masked-dir", "/proc/kcore", "/not/there"]);
    bundle.config["linux"]["readonlyPaths"] = json!(["fixed-dir", "/proc/sys"]);
    assert_same_as_runc(&bundle);
}

#[test]
fn a_volume_at_two_places_is_one() {
    let _unchanged = Host::unchanged();
    let volume = tempfile::tempdir().unwrap();
    // A FIFO, a lock, and a file that is written and read.
    let mut bundle = Bundle::shell(
        "rm -f /a/*; mkfifo /a/fifo; (echo through the fifo > /a/fifo) & cat /b/fifo; \
         exec 8> /a/lock 9> /b/lock; flock -n 8 && echo locked; flock -n 9 || echo held; \
         echo one > /a/file; cat /b/file; echo two >> /b/file; cat /a/file; \
         ln /b/file /b/link && stat -c %h /a/link; ln /a/file /b/other 2>&1; \
         [ $(stat -c %i /a/file) = $(stat -c %i /b/file) ] && echo same; cat /c/file; echo x 2>&1 > /c/file",
    );
    let mounts = bundle.config["mounts"].as_array_mut().unwrap();
    for (destination, how) in [("/a", "rw"), ("/b", "rw"), ("/c", "ro")] {
        mounts.push(
            json!({"destination": destination, "source": volume.path(), "options": ["bind", how]}),
        );
    }
    assert_same_as_runc(&bundle);
}

#[test]
fn a_file_system_of_layers_is_as_under_runc() {
    let _unchanged = Host::unchanged();
    let folder = tempfile::tempdir().unwrap();
    let layer = |name: &str| folder.path().join(name);
    for name in ["lower", "merged"] {
        fs::create_dir(layer(name)).unwrap();
    }
    fs::write(layer("lower/a"), "old\n").unwrap();
    for name in ["lower/b", "lower/c"] {
        fs::hard_link(layer("lower/a"), layer(name)).unwrap();
    }
    // Hard links of a lower layer part when one is written to.
    let mut bundle = Bundle::shell(
        "cd /layers; cat a b c; echo new > b; cat a b c; echo more >> c; cat a b c; \
         ln b d; echo newer > d; cat b d; stat -c '%h %n' a b c d; sync && echo written",
    );
    let mounts = bundle.config["mounts"].as_array_mut().unwrap();
    mounts.push(
        json!({"destination": "/layers", "source": layer("merged"), "options": ["bind", "rw"]}),
    );
    let said = [runc(), bulkhead()].map(|runtime| {
        for name in ["upper", "work"] {
            let _ = fs::remove_dir_all(layer(name));
            fs::create_dir(layer(name)).unwrap();
        }
        let options = format!(
            "lowerdir={},upperdir={},workdir={},index=off",
            layer("lower").display(),
            layer("upper").display(),
            layer("work").display()
        );
        let options = Some(options.as_str());
        let merged = layer("merged");
        mount(
            Some("o"),
            &merged,
            Some("overlay"),
            MsFlags::empty(),
            options,
        )
        .unwrap();
        let ended = finish(run_command(Command::new(runtime), &bundle).stdin(Stdio::null()));
        umount2(&merged, MntFlags::empty()).unwrap();
        ended.expect_code(0).stdout
    });
    assert_eq!(said[1], said[0], "bulkhead (left) and runc (right) differ");
}

#[test]
fn the_hosts_settings_for_files_and_mappings_hold() {
    let _unchanged = Host::unchanged();
    assert_same_as_runc(&Bundle::shell(
        "cd /proc/sys && grep '' fs/protected_hardlinks fs/protected_symlinks fs/protected_fifos fs/protected_regular vm/max_map_count",
    ));
}

#[test]
fn the_memory_of_the_hosts_processes_is_not_a_containers_to_read() {
    let _unchanged = Host::unchanged();
    let mut bundle = Bundle::shell(&format!(
        "cat /host/proc/{}/comm; head -c 1 /host/proc/{0}/mem 2>&1",
        std::process::id()
    ));
    let mounts = bundle.config["mounts"].as_array_mut().unwrap();
    mounts.push(json!({"destination": "/host/proc", "source": "/proc", "options": ["bind", "ro"]}));
    assert_same_as_runc(&bundle);
}

#[test]
fn the_memory_of_vmms_is_not_a_guests_to_read() {
    let _unchanged = Host::unchanged();
    let other = Container::running(bulkhead(), Bundle::idle());
    let mut bundle = Bundle::shell(
        "for comm in /host/proc/[0-9]*/task/*/comm; do
             task=${comm%/comm}
             grep -qsx bulkhead-vmm ${task%/task/*}/comm || continue
             for name in mem maps; do head -c 1 $task/$name 2>&1 | sed 's/.*: //'; done
         done | sort -u
         test $(grep -xs bulkhead-vmm /host/proc/[0-9]*/comm | wc -l) -ge 2 && echo several",
    );
    let mounts = bundle.config["mounts"].as_array_mut().unwrap();
    mounts.push(json!({"destination": "/host/proc", "source": "/proc", "options": ["bind", "ro"]}));
    let ended = run(&bundle).expect_code(0);
    // One answer to all, which is a refusal.
    assert_eq!(ended.stdout, "Permission denied\nseveral\n");
    drop(other);
}

#[test]
fn a_limit_of_the_size_of_files_on_the_host_fails_the_containers_writes() {
    let _unchanged = Host::unchanged();
    let bundle = Bundle::shell(
        "dd if=/dev/zero of=/big bs=1 count=1 seek=700M 2>&1 | grep -c 'too large'; echo small > /small; cat /small",
    );
    let mut command = Command::new("/bin/sh");
    // In blocks of 512 bytes.
    command.args(["-c", "ulimit -f 1048576; exec \"$@\"", "sh"]);
    let run = run_command(Command::new(bulkhead()), &bundle);
    command.arg(run.get_program()).args(run.get_args());
    let ended = finish(command.stdin(Stdio::null())).expect_code(0);
    assert_eq!(ended.stdout, "1\nsmall\n");
}

#[test]
fn a_file_that_the_host_makes_while_the_container_creates_it_keeps_its_permissions() {
    let _unchanged = Host::unchanged();
    let volume = tempfile::tempdir().unwrap();
    fs::set_permissions(volume.path(), fs::Permissions::from_mode(0o777)).unwrap();
    // The container has just seen that the file is not there, and believes it for a second.
    let mut bundle = Bundle::shell(
        "[ -e /volume/file ] || echo ready; read line; echo written > /volume/file && echo done",
    );
    bundle.config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let mounts = bundle.config["mounts"].as_array_mut().unwrap();
    mounts.push(
        json!({"destination": "/volume", "source": volume.path(), "options": ["bind", "rw"]}),
    );
    let mut child = start(run_command(Command::new(bulkhead()), &bundle).stdin(Stdio::piped()));
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    let file = volume.path().join("file");
    fs::write(&file, "root's").unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    child.stdin.take().unwrap().write_all(b"\n").unwrap();
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "");
    wait(child).expect_code(1);
    assert_eq!(fs::read(&file).unwrap(), b"root's");
}

/// A line for each mount of interest with its optional fields of mountinfo, but for the numbers of peer groups, and for masters: those
/// are the host's mounts, which a guest has not.
const PROPAGATION: &str = "sed -n -E 's|^[0-9]+ [0-9]+ [^ ]+ [^ ]+ (/) [^ ]+( .*)? - .*|\\1\\2|p; \
                           s|^[0-9]+ [0-9]+ [^ ]+ [^ ]+ (/v[^ ]*) [^ ]+( .*)? - .*|\\1\\2|p' /proc/self/mountinfo | \
                           sed -E 's/:[0-9]+//g; s/ master//'";

#[test]
fn mounts_propagate_as_under_runc() {
    let _unchanged = Host::unchanged();
    for root in ["", "private", "rprivate", "slave", "rslave"] {
        let volume = tempfile::tempdir().unwrap();
        let mut bundle = Bundle::shell(PROPAGATION);
        if !root.is_empty() {
            bundle.config["linux"]["rootfsPropagation"] = json!(root);
        }
        let mounts = bundle.config["mounts"].as_array_mut().unwrap();
        for kind in [
            "",
            "private",
            "rprivate",
            "slave",
            "rslave",
            "shared",
            "rshared",
            "unbindable",
            "runbindable",
        ] {
            let mut bind = vec!["rbind"];
            let mut tmpfs = vec!["nosuid"];
            if !kind.is_empty() {
                bind.push(kind);
                tmpfs.push(kind);
            }
            mounts.push(json!({"destination": format!("/v-bind-{kind}"), "type": "bind", "source": volume.path(), "options": bind}));
            mounts.push(json!({"destination": format!("/v-tmpfs-{kind}"), "type": "tmpfs", "source": "tmpfs", "options": tmpfs}));
        }
        eprintln!("rootfsPropagation {root:?}");
        assert_same_as_runc(&bundle);
    }
    // runc 1.1 leaves these private.
    for root in ["shared", "unbindable"] {
        let mut bundle = Bundle::shell(PROPAGATION);
        bundle.config["linux"]["rootfsPropagation"] = json!(root);
        assert_eq!(run(&bundle).expect_code(0).stdout, format!("/ {root}\n"));
    }
}

#[test]
fn a_container_looks_at_more_files_than_its_guest_may_have_cached() {
    let _unchanged = Host::unchanged();
    const MOST: usize = 16_384;
    const EACH: usize = 5_000;
    let volume = tempfile::tempdir().unwrap();
    let folders = ["a", "b", "c", "d", "e"];
    for folder in folders {
        let folder = volume.path().join(folder);
        fs::create_dir(&folder).unwrap();
        for file in 0..EACH {
            fs::write(folder.join(file.to_string()), "").unwrap();
        }
    }
    let mut bundle = Bundle::shell("exec sleep 100000");
    bundle.config["annotations"] = json!({"io.bulkhead.memory_mib": "128"});
    let mounts = bundle.config["mounts"].as_array_mut().unwrap();
    mounts.push(
        json!({"destination": "/volume", "source": volume.path(), "options": ["bind", "ro"]}),
    );
    let container = Container::running(bulkhead(), bundle);
    let vmm = processes::named("bulkhead-vmm");
    let descriptors = || processes::descriptors(vmm[0]);
    let mut held = Vec::new();
    for folder in folders {
        let seen = container.shell(&format!("ls -l /volume/{folder} | wc -l"));
        assert_eq!(seen.expect_code(0).stdout, format!("{}\n", EACH + 1));
        held.push(descriptors());
    }
    assert!(held.iter().all(|held| *held < MOST), "{held:?}");
    // What it has looked at last may be forgotten a little later.
    let start = std::time::Instant::now();
    while descriptors() > MOST * 5 / 8 {
        assert!(start.elapsed().as_secs() < 60, "{held:?}");
        container.shell("true").expect_code(0);
    }
}

#[test]
fn whoever_enters_the_mount_namespace_of_the_pid_sees_the_containers_files_and_not_the_hosts() {
    let _unchanged = Host::unchanged();
    let volume = tempfile::tempdir().unwrap();
    fs::write(volume.path().join("in-volume"), "volume\n").unwrap();
    for runtime in [runc(), bulkhead()] {
        let mut bundle = Bundle::idle();
        fs::write(bundle.in_root("in-root"), "root\n").unwrap();
        // What an image's links name is the image's.
        symlink("/", bundle.in_root("link")).unwrap();
        let mounts = bundle.config["mounts"].as_array_mut().unwrap();
        for (destination, options) in [
            ("/volume", json!(["rbind", "ro"])),
            ("/link/new/volume", json!(["bind"])),
        ] {
            mounts.push(json!({"destination": destination, "type": "bind", "source": volume.path(), "options": options}));
        }
        let container = Container::running(runtime, &bundle);
        let script = "cat /in-root /volume/in-volume /new/volume/in-volume; echo client > /from-client; \
                      echo x > /volume/x || echo read-only; test -e /link/etc/debian_version || echo own";
        let ended = finish(
            Command::new("nsenter")
                .arg(format!("--mount=/proc/{}/ns/mnt", container.pid))
                .args(["/bin/sh", "-c", script]),
        );
        assert_eq!(
            ended.stdout, "root\nvolume\nvolume\nread-only\nown\n",
            "{ended:?}"
        );
        assert_eq!(container.shell("cat /from-client").stdout, "client\n");
        let root = PathBuf::from(format!("/proc/{}/root", container.pid));
        assert_eq!(fs::read_to_string(root.join("in-root")).unwrap(), "root\n");
    }
    assert!(!Path::new("/from-client").exists());
    assert!(!Path::new("/new").exists());
}
