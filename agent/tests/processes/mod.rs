//! What processes are on their way to the program: under strict profiles, scheduled, with keyrings; and how all of them end.

use std::fs;

use bulkhead_protocol::agent::Stdio;
use serde_json::{Value, json};

use crate::bed::Bed;

/// A profile that refuses calls which no program needs that has started.
fn strict_profile() -> Value {
    json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{
            "names": ["umask", "setuid", "setgid", "setresuid", "setresgid", "setgroups", "getcwd", "chdir", "fchdir", "fchown",
                "chown", "access", "faccessat", "faccessat2", "memfd_create", "pidfd_open", "getpid", "prlimit64", "keyctl",
                "sched_setattr"],
            "action": "SCMP_ACT_ERRNO"
        }]
    })
}

pub async fn a_profile_may_refuse_what_a_process_needs_only_to_become_the_user() {
    let bed = Bed::new().await;
    // An applet that starts with nothing of it; a directory that only the user may enter.
    let args = json!(["/bin/id", "-u"]);
    let own = bed.rootfs().join("home/me");
    std::os::unix::fs::chown(&own, Some(1000), Some(1000)).unwrap();
    fs::set_permissions(&own, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    for no_new_privileges in [false, true] {
        for (uid, cwd) in [(0, "/"), (1000, "/"), (1000, "/home/me")] {
            let mut spec = bed.spec("");
            let user = json!({"uid": uid, "gid": uid, "umask": 0o027});
            spec["process"]["args"] = args.clone();
            spec["process"]["user"] = user.clone();
            spec["process"]["cwd"] = json!(cwd);
            spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
            spec["linux"]["seccomp"] = strict_profile();
            spec["hooks"] = json!({"startContainer": [
                {"path": "/bin/id", "timeout": 30}, {"path": "/bin/true"}
            ]});
            assert_eq!(bed.output(&spec).await, format!("{uid}\n"));
            spec["process"]["args"] = json!(["/bin/sleep", "1000"]);
            bed.create("box", &spec, Stdio::default()).await.unwrap();
            bed.start("box").await.unwrap();
            let mut process = bed.process("");
            process["args"] = args.clone();
            process["user"] = user;
            process["cwd"] = json!(cwd);
            process["noNewPrivileges"] = json!(no_new_privileges);
            assert_eq!(bed.exec_output("box", &process).await, format!("{uid}\n"));
            bed.delete("box").await.unwrap();
        }
    }
}

pub async fn a_hook_may_have_all_the_time_there_is() {
    let bed = Bed::new().await;
    let mut spec = bed.spec("true");
    spec["hooks"] = json!({"startContainer": [{"path": "/bin/true", "timeout": i64::MAX}]});
    assert_eq!(bed.output(&spec).await, "");
}
