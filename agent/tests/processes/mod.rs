//! What processes are on their way to the program: under strict profiles, scheduled, with keyrings; and how all of them end.

use std::fs;
use std::path::Path;

use bulkhead_protocol::agent::{Stdio, StreamKind};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;

use crate::bed::{Bed, all_pipes};
use crate::in_user_namespace;

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

/// Fields of `/proc/PID/stat` from the policy on (proc_pid_stat(5)).
fn policy(stat: &str) -> &str {
    stat.rsplit_once(") ")
        .unwrap()
        .1
        .split(' ')
        .nth(41 - 3)
        .unwrap()
}

pub async fn the_scheduler_is_that_of_the_process_that_is_executed() {
    let bed = Bed::new().await;
    let deadline = json!({"policy": "SCHED_DEADLINE", "runtime": 1_000_000, "deadline": 10_000_000, "period": 10_000_000});
    let reset = json!({"policy": "SCHED_BATCH", "flags": ["SCHED_FLAG_RESET_ON_FORK"]});
    for (scheduler, number) in [(deadline, "6"), (reset, "3")] {
        for profile in [None, Some(strict_profile())] {
            let mut spec = bed.spec("");
            spec["process"]["args"] = json!(["/bin/cat", "/proc/self/stat"]);
            spec["process"]["scheduler"] = scheduler.clone();
            spec["process"]["noNewPrivileges"] = json!(false);
            if let Some(profile) = profile {
                spec["linux"]["seccomp"] = profile;
            }
            assert_eq!(policy(&bed.output(&spec).await), number, "{scheduler}");
            // Hooks are forked by the process that is to be scheduled.
            spec["hooks"] = json!({"startContainer": [{"path": "/bin/true"}]});
            assert_eq!(policy(&bed.output(&spec).await), number, "{scheduler}");
            spec["process"]["args"] = json!(["/bin/sleep", "1000"]);
            bed.create("box", &spec, Stdio::default()).await.unwrap();
            bed.start("box").await.unwrap();
            let mut process = bed.process("");
            process["args"] = json!(["/bin/cat", "/proc/self/stat"]);
            let stat = bed.exec_output("box", &process).await;
            assert_eq!(policy(&stat), number, "{scheduler}");
            process["scheduler"] = json!({"policy": "SCHED_ISO"});
            let (_, message) = bed.run_exec("box", &process).await.unwrap_err();
            assert_eq!(message, "process.scheduler: invalid argument");
            bed.delete("box").await.unwrap();
        }
    }
    let mut spec = bed.spec("true");
    spec["process"]["scheduler"] = json!({"policy": "SCHED_ISO"});
    spec["hooks"] = json!({"startContainer": [{"path": "/bin/true"}]});
    bed.create("box", &spec, Stdio::default()).await.unwrap();
    let (_, message) = bed.start("box").await.unwrap_err();
    assert_eq!(message, "process.scheduler: invalid argument");
}

pub async fn the_numbers_of_the_hosts_processors_mean_nothing_to_processes_that_join() {
    let bed = Bed::new().await;
    bed.running("box").await;
    let mut process = bed.process("grep Cpus_allowed_list /proc/self/status");
    let own = bed.exec_output("box", &process).await;
    // The first one and one that no guest has.
    for numbers in ["0", "900"] {
        process["execCPUAffinity"] = json!({"initial": numbers, "final": numbers});
        assert_eq!(bed.exec_output("box", &process).await, own);
    }
}

pub async fn processes_that_join_share_the_session_keyring() {
    let bed = Bed::new().await;
    // Other keyrings of this name may be about.
    let id = format!("keyring-{}", std::process::id());
    let script = format!("grep _ses.{id} /proc/keys");
    let and_wait = format!("{script}; exec >&-; sleep 1000");
    for mut spec in [bed.spec(&and_wait), in_user_namespace(&bed, &and_wait)] {
        let masked = spec["linux"]["maskedPaths"].as_array_mut().unwrap();
        masked.retain(|path| path != "/proc/keys");
        bed.create(&id, &spec, all_pipes()).await.unwrap();
        let mut output = bed.stream(&id, StreamKind::STDOUT).await;
        bed.start(&id).await.unwrap();
        let mut inits = String::new();
        output.read_to_string(&mut inits).await.unwrap();
        let serial = |keys: &str| -> Vec<String> {
            let lines = keys.lines();
            let serial = |line: &str| line.split(' ').next().map(str::to_owned);
            lines.filter_map(serial).collect()
        };
        let joined = bed.exec_output(&id, &bed.process(&script)).await;
        assert_eq!(serial(&inits).len(), 1, "{inits}");
        assert_eq!(serial(&joined), serial(&inits), "{joined}{inits}");
        bed.delete(&id).await.unwrap();
    }
}

pub async fn the_home_directory_is_found_among_names_of_any_encoding() {
    let bed = Bed::new().await;
    let passwd = b"caf\xe9:x:5:5:Caf\xe9:/:/bin/sh\nme:x:1000:1000::/home/caf\xe9:/bin/sh\n";
    fs::write(bed.rootfs().join("etc/passwd"), passwd).unwrap();
    let mut spec = bed.spec("echo $HOME | /bin/busybox od -An -tx1");
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let output = bed.output(&spec).await;
    assert!(output.trim_end().ends_with(" 63 61 66 e9 0a"), "{output}");
}

pub async fn an_init_that_has_left_its_cgroup_ends_with_its_container() {
    let bed = Bed::new().await;
    let elsewhere = bed.cgroup_of("box").with_file_name("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let mount = elsewhere.ancestors().find(|path| {
        let parent = path.parent().unwrap_or(Path::new("/"));
        !parent.join("cgroup.procs").exists()
    });
    let below = elsewhere.strip_prefix(mount.unwrap()).unwrap();
    let script = format!(
        "echo 0 > /sys/fs/cgroup/{}/cgroup.procs && echo left; exec sleep 1000",
        below.display()
    );
    let mut spec = bed.spec(&script);
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|namespace| namespace["type"] != "cgroup");
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.last_mut().unwrap()["options"] = json!(["nosuid", "noexec", "nodev"]);
    for how in ["kill", "delete"] {
        bed.create("box", &spec, all_pipes()).await.unwrap();
        let mut output = bed.stream("box", StreamKind::STDOUT).await;
        bed.start("box").await.unwrap();
        let mut left = [0; 5];
        output.read_exact(&mut left).await.unwrap();
        assert_eq!(&left, b"left\n");
        if how == "kill" {
            drop(output);
            bed.signal("box", 9, true).await.unwrap();
            let errors = bed.stream("box", StreamKind::STDERR).await;
            drop(errors);
            assert_eq!(bed.wait("box").await.unwrap().exit_code, 128 + 9);
        }
        bed.delete("box").await.unwrap();
    }
    fs::remove_dir(&elsewhere).unwrap();
}

pub async fn a_signal_for_all_reaches_those_that_are_forked_meanwhile() {
    let bed = Bed::new().await;
    // Each lives only until it has forked the next, and holds the output open.
    let script = "hop() { hop & }; for i in 1 2 3 4 5 6; do hop; done; exec >&-; echo ready >&2; \
                  while :; do sleep 1000; done";
    let spec = bed.spec(script);
    let stdio = Stdio {
        stdout: true,
        stderr: true,
        ..Default::default()
    };
    for round in 0..5 {
        let id = format!("box{round}");
        bed.create(&id, &spec, stdio.clone()).await.unwrap();
        let mut output = bed.stream(&id, StreamKind::STDOUT).await;
        let mut ready = bed.stream(&id, StreamKind::STDERR).await;
        bed.start(&id).await.unwrap();
        ready.read_exact(&mut [0; 6]).await.unwrap();
        bed.signal(&id, 15, true).await.unwrap();
        output.read_to_string(&mut String::new()).await.unwrap();
        // It is no signal for the first process, which has no handler for it.
        bed.signal(&id, 0, false).await.unwrap();
        bed.delete(&id).await.unwrap();
    }
}

pub async fn a_paused_container_stays_so_when_a_signal_for_all_comes() {
    let bed = Bed::new().await;
    bed.running("box").await;
    bed.pause("box").await.unwrap();
    bed.signal("box", 1, true).await.unwrap();
    let refused = bed.pause("box").await.unwrap_err();
    assert_eq!(refused.1, "container not running: it is paused");
    bed.resume("box").await.unwrap();
}

pub async fn a_hook_may_have_all_the_time_there_is() {
    let bed = Bed::new().await;
    let mut spec = bed.spec("true");
    spec["hooks"] = json!({"startContainer": [{"path": "/bin/true", "timeout": i64::MAX}]});
    assert_eq!(bed.output(&spec).await, "");
}
