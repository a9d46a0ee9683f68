//! Processes that join a container, and what is done to a container while it runs.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use bulkhead_protocol::agent::{Stdio, StreamKind};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;
use ttrpc::Code;

use crate::bed::{Bed, all_pipes};
use crate::{in_user_namespace, skip};

pub async fn a_process_joins_a_container() {
    let bed = Bed::new().await;
    bed.running("box").await;
    let script = "hostname; for kind in pid net ipc uts mnt cgroup; do \
                  test $(readlink /proc/self/ns/$kind) = $(readlink /proc/1/ns/$kind) || echo other $kind; done; \
                  grep 0:: /proc/self/cgroup; pwd; ls -d /proc/[0-9]* | wc -l; echo $HOME; readlink /proc/1/exe; \
                  exec ls /proc/self/fd";
    let output = bed.exec_output("box", &bed.process(script)).await;
    // Descriptor 3 is the directory that `ls` reads; init, the shell, ls and wc are all there is.
    let lines: Vec<_> = output.lines().collect();
    assert_eq!(lines.get(..3), Some(&["box", "0::/", "/"][..]), "{output}");
    assert_eq!(
        lines.get(4..),
        Some(&["/root", "/bin/busybox", "0", "1", "2", "3"][..]),
        "{output}"
    );
    assert!(matches!(lines.get(3), Some(&"3" | &"4")), "{output}");
}

pub async fn the_user_limits_and_capabilities_of_an_exec_are_its_own_or_the_containers() {
    let bed = Bed::new().await;
    let mut spec = bed.spec("exec sleep 1000");
    spec["process"]["user"] = json!({"uid": 0, "gid": 0, "umask": 0o077});
    spec["process"]["oomScoreAdj"] = json!(77);
    bed.create("box", &spec, Stdio::default()).await.unwrap();
    bed.start("box").await.unwrap();
    let script = "grep -E 'CapBnd|NoNewPrivs' /proc/self/status; ulimit -Sn; umask; cat /proc/self/oom_score_adj";
    let output = bed.exec_output("box", &bed.process(script)).await;
    let fields: Vec<_> = output.split_whitespace().collect();
    let set = "0000000000000420";
    assert_eq!(
        fields,
        ["CapBnd:", set, "NoNewPrivs:", "0", "512", "0077", "77"]
    );

    let script = "grep -E 'CapBnd|CapEff|NoNewPrivs' /proc/self/status; ulimit -Sn; umask; cat /proc/self/oom_score_adj; \
                  id -u; id -g; id -G; echo $HOME; pwd; echo $NAME; echo x > /dev/stdout";
    let mut process = bed.process(script);
    process["user"] = json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 6], "umask": 0o027});
    process["capabilities"] = json!({"bounding": ["CAP_KILL"]});
    process["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}]);
    process["oomScoreAdj"] = json!(88);
    process["noNewPrivileges"] = json!(true);
    process["cwd"] = json!("/tmp");
    process["env"] = json!(["PATH=/bin", "NAME=value"]);
    let output = bed.exec_output("box", &process).await;
    let fields: Vec<_> = output.split_whitespace().collect();
    assert_eq!(
        fields,
        [
            "CapEff:",
            "0000000000000000",
            "CapBnd:",
            "0000000000000020",
            "NoNewPrivs:",
            "1",
            "100",
            "0027",
            "88",
            "1000",
            "1001",
            "1001",
            "5",
            "6",
            "/home/me",
            "/tmp",
            "value",
            "x"
        ]
    );

    // Fewer descriptors than the agent has.
    let mut process = bed.process("ulimit -n");
    process["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 12, "hard": 12}]);
    assert_eq!(bed.exec_output("box", &process).await, "12\n");
}

pub async fn an_exec_is_never_seen_with_more_capabilities_than_its_own() {
    let bed = Bed::new().await;
    let set = "0000000000000420";
    let script = format!(
        "echo ready; while seen=$(grep -hs CapPrm /proc/[0-9]*/status); test \"$seen\"; do \
         echo \"$seen\" | grep -v {set}; echo >> /data/rounds; done"
    );
    bed.create("box", &bed.spec(&script), all_pipes())
        .await
        .unwrap();
    let mut stdout = bed.stream("box", StreamKind::STDOUT).await;
    let _stderr = bed.stream("box", StreamKind::STDERR).await;
    bed.start("box").await.unwrap();
    stdout.read_exact(&mut [0; 6]).await.unwrap();
    for _ in 0..100 {
        bed.exec_output("box", &bed.process("true")).await;
    }
    bed.signal("box", 9, false).await.unwrap();
    let mut seen = String::new();
    stdout.read_to_string(&mut seen).await.unwrap();
    assert_eq!(seen, "");
    let rounds = fs::read(bed.rootfs().join("data/rounds")).unwrap();
    assert!(
        rounds.len() > 1,
        "it has not looked while there were others"
    );
}

pub async fn failures_of_an_exec_are_said_in_runcs_words_and_leave_nothing() {
    let bed = Bed::new().await;
    bed.running("box").await;
    let broken = bed.rootfs().join("bin/broken");
    fs::write(&broken, "\0\0\0").unwrap();
    fs::set_permissions(&broken, fs::Permissions::from_mode(0o755)).unwrap();
    let with = |field: &str, value: serde_json::Value| {
        let mut process = bed.process("");
        process[field] = value;
        process
    };
    for (process, code, message) in [
        (
            with("args", json!(["nothing"])),
            Code::NOT_FOUND,
            "exec: \"nothing\": executable file not found in $PATH",
        ),
        (
            with("args", json!(["/x/y"])),
            Code::NOT_FOUND,
            "exec: \"/x/y\": stat /x/y: no such file or directory",
        ),
        (
            with("args", json!(["/etc/plain"])),
            Code::PERMISSION_DENIED,
            "exec: \"/etc/plain\": permission denied",
        ),
        (
            with("args", json!(["broken"])),
            Code::INTERNAL,
            "exec /bin/broken: exec format error",
        ),
        (
            with("cwd", json!("/not/there")),
            Code::NOT_FOUND,
            "chdir to cwd (\"/not/there\") set in config.json failed: no such file or directory",
        ),
        (
            with("args", json!([])),
            Code::INVALID_ARGUMENT,
            "process.args: must not be empty",
        ),
        (
            with("apparmorProfile", json!("mine")),
            Code::INVALID_ARGUMENT,
            "process.apparmorProfile: the guest's kernel has no such security module; remove it",
        ),
        (
            with("terminal", json!(true)),
            Code::INVALID_ARGUMENT,
            "process.terminal: the request's stdio says false",
        ),
    ] {
        let error = bed
            .exec("box", "one", &process, all_pipes())
            .await
            .unwrap_err();
        assert_eq!(error, (code, message.to_owned()));
    }
    // The id is free again, and nothing of them runs.
    let process = bed.process("exec ls -d /proc/[0-9]*");
    let output = bed.exec_output("box", &process).await;
    assert_eq!(output.lines().count(), 2, "{output}");
    assert_eq!(
        bed.exec("no", "one", &process, all_pipes())
            .await
            .unwrap_err()
            .0,
        Code::NOT_FOUND
    );
}

pub async fn a_working_directory_outside_the_root_is_refused() {
    let bed = Bed::new().await;
    bed.running("box").await;
    for number in 3..12 {
        let mut process = bed.process("pwd; ls");
        process["cwd"] = json!(format!("/proc/self/fd/{number}"));
        let (_, message) = bed.run_exec("box", &process).await.unwrap_err();
        assert!(message.starts_with("chdir to cwd ("), "{message}");
        let mut spec = bed.spec("pwd; ls");
        spec["process"]["cwd"] = json!(format!("/proc/self/fd/{number}"));
        let created = bed.create("other", &spec, Stdio::default()).await;
        assert!(created.is_err());
    }
    bed.delete("box").await.unwrap();

    // Where the guest's processes can be seen, theirs are ways out.
    let mut spec = bed.spec("exec sleep 1000");
    spec["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .retain(|namespace| namespace["type"] != "pid");
    bed.create("box", &spec, Stdio::default()).await.unwrap();
    bed.start("box").await.unwrap();
    for place in ["root", "cwd"] {
        let mut process = bed.process("pwd; ls");
        process["cwd"] = json!(format!("/proc/{}/{place}", bed.agent.id()));
        let error = bed.run_exec("box", &process).await.unwrap_err();
        assert_eq!(
            error,
            (
                Code::INVALID_ARGUMENT,
                "current working directory is outside of container mount namespace root -- possible container breakout \
                 detected"
                    .to_owned()
            )
        );
    }
}

pub async fn exec_ids_are_taken_once_and_free_after_deletion() {
    let bed = Bed::new().await;
    bed.running("box").await;
    let process = bed.process("exec sleep 1000");
    for id in ["", &"x".repeat(256)] {
        let error = bed.exec("box", id, &process, Stdio::default()).await;
        assert_eq!(error.unwrap_err().0, Code::INVALID_ARGUMENT);
    }
    for _ in 0..2 {
        bed.exec("box", "one", &process, Stdio::default())
            .await
            .unwrap();
        let error = bed
            .exec("box", "one", &process, Stdio::default())
            .await
            .unwrap_err();
        assert_eq!(
            error,
            (
                Code::ALREADY_EXISTS,
                "process one already exists".to_owned()
            )
        );
        assert_eq!(
            bed.delete_exec("box", "one").await.unwrap_err().0,
            Code::FAILED_PRECONDITION
        );
        bed.signal_exec("box", "one", 15).await.unwrap();
        assert_eq!(bed.wait_exec("box", "one").await.unwrap().exit_code, 143);
        let error = bed.signal_exec("box", "one", 15).await.unwrap_err();
        assert_eq!(
            error,
            (Code::NOT_FOUND, "process already finished".to_owned())
        );
        bed.delete_exec("box", "one").await.unwrap();
        assert_eq!(
            bed.delete_exec("box", "one").await.unwrap_err().0,
            Code::NOT_FOUND
        );
        assert_eq!(
            bed.wait_exec("box", "one").await.unwrap_err().0,
            Code::NOT_FOUND
        );
    }
}

pub async fn an_exec_has_its_own_streams_signals_and_exit_code() {
    let bed = Bed::new().await;
    bed.running("box").await;
    let script =
        "trap 'echo got it >&2; exit 5' TERM; echo ready; cat; while :; do sleep 0.1; done";
    for id in ["one", "two"] {
        bed.exec("box", id, &bed.process(script), all_pipes())
            .await
            .unwrap();
    }
    let mut others = bed.stream_of("box", "two", StreamKind::STDOUT).await;
    let mut stdin = bed.stream_of("box", "one", StreamKind::STDIN).await;
    let mut stdout = bed.stream_of("box", "one", StreamKind::STDOUT).await;
    let mut stderr = bed.stream_of("box", "one", StreamKind::STDERR).await;
    stdin.write_all(b"typed").await.unwrap();
    stdin.shutdown().await.unwrap();
    let mut text = [0; 11];
    stdout.read_exact(&mut text).await.unwrap();
    assert_eq!(&text, b"ready\ntyped");
    bed.signal_exec("box", "one", 15).await.unwrap();
    let (mut rest, mut errors) = (String::new(), String::new());
    stdout.read_to_string(&mut rest).await.unwrap();
    stderr.read_to_string(&mut errors).await.unwrap();
    assert_eq!((rest.as_str(), errors.as_str()), ("", "got it\n"));
    assert_eq!(bed.wait_exec("box", "one").await.unwrap().exit_code, 5);
    // The other one is untouched, and so is the container.
    let mut ready = [0; 6];
    others.read_exact(&mut ready).await.unwrap();
    bed.signal_exec("box", "two", 9).await.unwrap();
    assert_eq!(others.read(&mut [0; 1]).await.unwrap(), 0);
    let _stderr = bed.stream_of("box", "two", StreamKind::STDERR).await;
    assert_eq!(bed.wait_exec("box", "two").await.unwrap().exit_code, 137);
    assert_eq!(
        bed.exec_output("box", &bed.process("echo alive")).await,
        "alive\n"
    );
}

pub async fn the_exit_of_an_exec_comes_after_its_last_byte_and_does_not_wait_for_its_background() {
    let bed = Bed::new().await;
    bed.running("box").await;
    let stdio = Stdio {
        stdout: true,
        ..Default::default()
    };
    let process = bed.process("sleep 1000 & head -c 60000 /dev/zero; exit 3");
    bed.exec("box", "one", &process, stdio).await.unwrap();
    let waiting = bed.wait_exec("box", "one");
    tokio::pin!(waiting);
    // All of it waits in the pipe, and the exit with it.
    assert!(
        timeout(Duration::from_millis(300), &mut waiting)
            .await
            .is_err()
    );
    let mut stdout = bed.stream_of("box", "one", StreamKind::STDOUT).await;
    assert_eq!(waiting.await.unwrap().exit_code, 3);
    let mut data = vec![0; 60_000];
    stdout.read_exact(&mut data).await.unwrap();
    assert_eq!(stdout.read(&mut [0; 1]).await.unwrap(), 0);
    bed.delete_exec("box", "one").await.unwrap();
}

pub async fn a_slow_reader_slows_an_exec() {
    let bed = Bed::new().await;
    bed.running("box").await;
    let stdio = Stdio {
        stdout: true,
        ..Default::default()
    };
    let size = 20_000_000;
    let script = format!("head -c {size} /dev/zero; touch /data/written");
    bed.exec("box", "one", &bed.process(&script), stdio)
        .await
        .unwrap();
    let mut stdout = bed.stream_of("box", "one", StreamKind::STDOUT).await;
    let waiting = bed.wait_exec("box", "one");
    tokio::pin!(waiting);
    let early = timeout(Duration::from_millis(500), &mut waiting).await;
    assert!(early.is_err() && !bed.rootfs().join("data/written").exists());
    let mut data = Vec::new();
    stdout.read_to_end(&mut data).await.unwrap();
    assert_eq!(data.len(), size);
    assert_eq!(waiting.await.unwrap().exit_code, 0);
}

pub async fn an_exec_ends_with_its_container() {
    let bed = Bed::new().await;
    for own_pids in [true, false] {
        let mut spec = bed.spec("exec sleep 1000");
        let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| own_pids || namespace["type"] != "pid");
        bed.create("box", &spec, Stdio::default()).await.unwrap();
        bed.start("box").await.unwrap();
        let process = bed.process("echo hello; exec sleep 1000");
        bed.exec("box", "one", &process, all_pipes()).await.unwrap();
        let mut stdout = bed.stream_of("box", "one", StreamKind::STDOUT).await;
        let _stderr = bed.stream_of("box", "one", StreamKind::STDERR).await;
        let mut output = [0; 6];
        stdout.read_exact(&mut output).await.unwrap();
        bed.signal("box", 9, false).await.unwrap();
        assert_eq!(bed.wait_exec("box", "one").await.unwrap().exit_code, 137);
        assert_eq!(stdout.read(&mut output).await.unwrap(), 0);
        bed.delete_exec("box", "one").await.unwrap();
        bed.delete("box").await.unwrap();
    }
}

pub async fn deleting_a_container_forgets_its_execs() {
    let bed = Bed::new().await;
    bed.running("box").await;
    let process = bed.process("setsid sleep 1000 & exec sleep 1000");
    let pid = bed.exec("box", "one", &process, all_pipes()).await.unwrap();
    let waiting = bed.wait_exec("box", "one");
    let (exit, deleted) = tokio::join!(waiting, async {
        // The wait is sent first; both are on one connection.
        bed.delete("box").await
    });
    deleted.unwrap();
    assert_eq!(exit.unwrap().exit_code, 137);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    assert!(!bed.cgroup_of("box").exists());
    assert_eq!(
        bed.delete_exec("box", "one").await.unwrap_err().0,
        Code::NOT_FOUND
    );
    bed.running("box").await;
    bed.exec("box", "one", &bed.process("true"), Stdio::default())
        .await
        .unwrap();
}

pub async fn a_stopped_container_refuses_an_exec() {
    let bed = Bed::new().await;
    let process = bed.process("exec sleep 1000");
    let refused = (
        Code::FAILED_PRECONDITION,
        "cannot exec in a stopped container".to_owned(),
    );
    for _ in 0..20 {
        bed.running("box").await;
        bed.signal("box", 9, false).await.unwrap();
        // In time, half-way, or too late: it ends.
        match bed.exec("box", "one", &process, Stdio::default()).await {
            Ok(_) => assert_eq!(bed.wait_exec("box", "one").await.unwrap().exit_code, 137),
            Err((Code::INTERNAL, message)) => assert_eq!(
                message,
                "the container's new process was killed during its set-up"
            ),
            Err(error) => assert_eq!(error, refused),
        }
        bed.wait("box").await.unwrap();
        let error = bed.exec("box", "two", &process, Stdio::default()).await;
        assert_eq!(error.unwrap_err(), refused);
        bed.delete("box").await.unwrap();
    }
}

pub async fn terminals_are_resized() {
    let bed = Bed::new().await;
    let stdio = Stdio {
        terminal: true,
        terminal_width: 80,
        terminal_height: 24,
        ..Default::default()
    };
    let script = "trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.1; done";
    let mut spec = bed.spec(script);
    spec["process"]["terminal"] = json!(true);
    bed.create("box", &spec, stdio.clone()).await.unwrap();
    let mut init = bed.stream("box", StreamKind::TERMINAL).await;
    bed.start("box").await.unwrap();
    let mut process = bed.process(script);
    process["terminal"] = json!(true);
    bed.exec("box", "one", &process, stdio).await.unwrap();
    let mut exec = bed.stream_of("box", "one", StreamKind::TERMINAL).await;
    bed.exec(
        "box",
        "two",
        &bed.process("exec sleep 1000"),
        Stdio::default(),
    )
    .await
    .unwrap();
    let error = bed.resize("box", "two", 1, 1).await.unwrap_err();
    assert_eq!(
        error,
        (
            Code::FAILED_PRECONDITION,
            "the process has no terminal".to_owned()
        )
    );
    for (width, height) in [(65_536, 1), (1, 65_536)] {
        let error = bed.resize("box", "one", width, height).await.unwrap_err();
        assert_eq!(error.0, Code::INVALID_ARGUMENT);
    }
    for (id, terminal, width, height) in [("one", &mut exec, 99, 33), ("", &mut init, 120, 50)] {
        let mut ready = [0; 7];
        terminal.read_exact(&mut ready).await.unwrap();
        bed.resize("box", id, width, height).await.unwrap();
        let mut output = String::new();
        terminal.read_to_string(&mut output).await.unwrap();
        assert_eq!(output, format!("{height} {width}\r\n"));
    }
}

pub async fn a_terminal_of_an_exec_is_in_the_containers_devpts() {
    let bed = Bed::new().await;
    bed.running("box").await;
    let stdio = Stdio {
        terminal: true,
        terminal_width: 100,
        terminal_height: 40,
        ..Default::default()
    };
    let mut process = bed.process(
        "tty; stty size; stat -c %u $(tty); echo x > /dev/tty; read line; echo \"<$line>\"; exit 4",
    );
    process["terminal"] = json!(true);
    process["user"] = json!({"uid": 1000, "gid": 1000});
    bed.exec("box", "one", &process, stdio).await.unwrap();
    let mut terminal = bed.stream_of("box", "one", StreamKind::TERMINAL).await;
    let shown = "/dev/pts/0\r\n40 100\r\n1000\r\nx\r\n";
    let mut output = vec![0; shown.len()];
    terminal.read_exact(&mut output).await.unwrap();
    assert_eq!(String::from_utf8(output).unwrap(), shown);
    terminal.write_all(b"typed\n").await.unwrap();
    let mut output = String::new();
    terminal.read_to_string(&mut output).await.unwrap();
    assert_eq!(output, "typed\r\n<typed>\r\n");
    assert_eq!(bed.wait_exec("box", "one").await.unwrap().exit_code, 4);
}

pub async fn an_exec_without_new_namespaces_joins_too() {
    let bed = Bed::new().await;
    let mut spec = bed.spec("exec sleep 1000");
    spec["linux"]["namespaces"] = json!([{"type": "mount"}]);
    spec.as_object_mut().unwrap().remove("hostname");
    bed.create("box", &spec, Stdio::default()).await.unwrap();
    bed.start("box").await.unwrap();
    let outcome = bed
        .run_exec("box", &bed.process("ls /etc; exit 3"))
        .await
        .unwrap();
    assert_eq!(
        (outcome.code, outcome.stdout.as_str()),
        (3, "passwd\nplain\n")
    );
}

pub async fn a_thousand_execs_leak_nothing() {
    let bed = Bed::new().await;
    bed.running("box").await;
    let fds = format!("/proc/{}/fd", bed.agent.id());
    let count = || fs::read_dir(&fds).unwrap().count();
    let children = format!("/proc/{0}/task/{0}/children", bed.agent.id());
    let children = || fs::read_to_string(&children).unwrap_or_default();
    let memory = || {
        let status = fs::read_to_string(format!("/proc/{}/status", bed.agent.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS"));
        let size = line.and_then(|line| line.split_whitespace().nth(1));
        size.unwrap().parse::<u64>().unwrap()
    };
    let process = bed.process("echo x");
    let failing = {
        let mut process = bed.process("");
        process["args"] = json!(["nothing"]);
        process
    };
    for _ in 0..20 {
        bed.exec_output("box", &process).await;
    }
    let before = (count(), children());
    let memory_before = memory();
    for round in 0..1000 {
        assert_eq!(bed.exec_output("box", &process).await, "x\n");
        if round % 4 == 0 {
            bed.exec("box", "exec", &failing, all_pipes())
                .await
                .unwrap_err();
        }
    }
    // Its children are the container's init alone, and none that has ended and waits to be reaped.
    assert_eq!((count(), children()), before);
    assert!(
        memory() < memory_before + 1024,
        "{memory_before} kB before, {} kB after",
        memory()
    );
}

pub async fn a_process_joins_a_user_namespace() {
    let bed = Bed::new().await;
    let mut spec = in_user_namespace(&bed, "exec sleep 1000");
    spec["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({"type": "time"}));
    bed.create("box", &spec, Stdio::default()).await.unwrap();
    bed.start("box").await.unwrap();
    let mut process = bed.process(
        "id -u; id -G; for kind in user time pid mnt; do \
         test $(readlink /proc/self/ns/$kind) = $(readlink /proc/1/ns/$kind) || echo other $kind; done; \
         ulimit -Hn; cat /proc/self/oom_score_adj; touch /data/mine; echo out > /dev/stdout",
    );
    process["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 9_000, "hard": 9_000}]);
    process["oomScoreAdj"] = json!(300);
    assert_eq!(
        bed.exec_output("box", &process).await,
        "0\n0\n9000\n300\nout\n"
    );
    let owner = fs::metadata(bed.rootfs().join("data/mine")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&owner), 100_000);
    process["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [7]});
    process["args"] = json!(["/bin/sh", "-c", "id -u; id -G; echo x > /dev/stdout"]);
    assert_eq!(bed.exec_output("box", &process).await, "1000\n1000 7\nx\n");
    process["user"] = json!({"uid": 70_000, "gid": 0});
    let (code, message) = bed.run_exec("box", &process).await.unwrap_err();
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.starts_with("process.user.uid: "), "{message}");

    let stdio = Stdio {
        terminal: true,
        ..Default::default()
    };
    let mut process = bed.process("tty; echo x > /dev/tty");
    process["terminal"] = json!(true);
    process["user"] = json!({"uid": 1000, "gid": 1000});
    bed.exec("box", "one", &process, stdio).await.unwrap();
    let mut terminal = bed.stream_of("box", "one", StreamKind::TERMINAL).await;
    let mut output = String::new();
    terminal.read_to_string(&mut output).await.unwrap();
    assert_eq!(output, "/dev/pts/0\r\nx\r\n");
}

pub async fn a_process_joins_under_the_profile_of_its_container() {
    let bed = Bed::new().await;
    let mut spec = bed.spec("exec sleep 1000");
    spec["process"]["noNewPrivileges"] = json!(false);
    spec["process"]["terminal"] = json!(true);
    spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95},
            // Of no concern to a program that neither forks nor talks to anybody; nor to how it is started.
            {
                "names": ["clone", "clone3", "fork", "vfork", "setsid", "setns", "unshare",
                          "sendmsg", "sendto", "recvmsg", "recvfrom"],
                "action": "SCMP_ACT_KILL_PROCESS"
            }
        ]
    });
    let stdio = Stdio {
        terminal: true,
        ..Default::default()
    };
    bed.create("box", &spec, stdio).await.unwrap();
    bed.start("box").await.unwrap();
    for no_new_privileges in [false, true] {
        let mut process = bed.process("");
        process["args"] = json!(["mkdir", "/data/made"]);
        process["noNewPrivileges"] = json!(no_new_privileges);
        let outcome = bed.run_exec("box", &process).await.unwrap();
        assert_eq!(outcome.code, 1);
        assert!(
            outcome.stderr.contains("not supported"),
            "{}",
            outcome.stderr
        );
        process["args"] = json!(["nothing"]);
        let error = bed.run_exec("box", &process).await.unwrap_err();
        let message = "exec: \"nothing\": executable file not found in $PATH";
        assert_eq!(error, (Code::NOT_FOUND, message.to_owned()));
    }
}

pub async fn a_paused_container_stands_still() {
    let bed = Bed::new().await;
    let spec = bed.spec("while :; do echo x; sleep 0.01; done");
    bed.create("box", &spec, all_pipes()).await.unwrap();
    let mut stdout = bed.stream("box", StreamKind::STDOUT).await;
    let _stderr = bed.stream("box", StreamKind::STDERR).await;
    bed.start("box").await.unwrap();
    stdout.read_exact(&mut [0; 2]).await.unwrap();
    let not_paused = (Code::FAILED_PRECONDITION, "container not paused".to_owned());
    assert_eq!(bed.resume("box").await.unwrap_err(), not_paused);

    bed.pause("box").await.unwrap();
    let events = bed.cgroup_of("box").join("cgroup.events");
    assert!(fs::read_to_string(&events).unwrap().contains("frozen 1"));
    assert_eq!(
        bed.pause("box").await.unwrap_err(),
        (
            Code::FAILED_PRECONDITION,
            "container not running: it is paused".to_owned()
        )
    );
    assert_eq!(
        bed.exec("box", "one", &bed.process("true"), Stdio::default())
            .await
            .unwrap_err(),
        (
            Code::FAILED_PRECONDITION,
            "cannot exec in a paused container".to_owned()
        )
    );
    // What was written before comes through; then there is silence.
    let mut buffer = [0; 4096];
    while let Ok(length) = timeout(Duration::from_millis(200), stdout.read(&mut buffer)).await {
        assert_ne!(length.unwrap(), 0);
    }
    bed.resume("box").await.unwrap();
    stdout.read_exact(&mut [0; 2]).await.unwrap();
    bed.exec_output("box", &bed.process("true")).await;
}

pub async fn a_paused_container_can_be_killed_and_deleted() {
    let bed = Bed::new().await;
    bed.running("box").await;
    bed.exec(
        "box",
        "one",
        &bed.process("exec sleep 1000"),
        Stdio::default(),
    )
    .await
    .unwrap();
    bed.pause("box").await.unwrap();
    bed.signal("box", 9, false).await.unwrap();
    assert_eq!(bed.wait("box").await.unwrap().exit_code, 137);
    assert_eq!(bed.wait_exec("box", "one").await.unwrap().exit_code, 137);
    for refused in [bed.pause("box").await, bed.resume("box").await] {
        let expected = (
            Code::FAILED_PRECONDITION,
            "container not running".to_owned(),
        );
        assert_eq!(refused.unwrap_err(), expected);
    }
    bed.delete("box").await.unwrap();

    bed.running("box").await;
    bed.pause("box").await.unwrap();
    bed.delete("box").await.unwrap();
    assert!(!bed.cgroup_of("box").exists());
    // One that was only created can be paused too, as with runc.
    bed.create("box", &bed.spec("true"), Stdio::default())
        .await
        .unwrap();
    bed.pause("box").await.unwrap();
    bed.resume("box").await.unwrap();
    bed.start("box").await.unwrap();
    assert_eq!(bed.wait("box").await.unwrap().exit_code, 0);
}

pub async fn processes_are_listed_with_their_exec_ids_wherever_their_cgroup_is() {
    let bed = Bed::new().await;
    let init = bed.running("box").await;
    let process = bed.process("exec sleep 1000");
    let one = bed.exec("box", "one", &process, Stdio::default()).await;
    let two = bed.exec("box", "two", &process, Stdio::default()).await;
    let (one, two) = (one.unwrap(), two.unwrap());
    // As a container does that has a cgroup of its own to divide; one of threads, which has no list.
    let (below, threads) = (
        bed.cgroup_of("box").join("below"),
        bed.cgroup_of("box").join("below/threads"),
    );
    fs::create_dir(&below).unwrap();
    fs::create_dir(&threads).unwrap();
    fs::write(below.join("cgroup.procs"), two.to_string()).unwrap();
    fs::write(threads.join("cgroup.type"), "threaded").unwrap();
    let mut processes = bed.processes("box").await.unwrap();
    processes.sort();
    let mut expected = vec![
        (init, String::new()),
        (one, "one".to_owned()),
        (two, "two".to_owned()),
    ];
    expected.sort();
    assert_eq!(processes, expected);
    bed.signal("box", 9, true).await.unwrap();
    bed.wait("box").await.unwrap();
    bed.wait_exec("box", "two").await.unwrap();
    assert_eq!(bed.processes("box").await.unwrap(), []);
    assert_eq!(bed.processes("no").await.unwrap_err().0, Code::NOT_FOUND);
}

pub async fn the_figures_of_a_container_are_its_cgroups() {
    let bed = Bed::new().await;
    bed.running("box").await;
    let process = bed.process("head -c 100000000 /dev/zero | wc -c");
    assert_eq!(bed.exec_output("box", &process).await, "100000000\n");
    let stats = bed.stats("box").await.unwrap();
    assert!(stats.cpu["usage_usec"] > 0, "{stats}");
    assert!(stats.cpu["usage_usec"] >= stats.cpu["user_usec"], "{stats}");
    if bed.has_controller("memory") && bed.has_controller("pids") {
        assert!(stats.memory_current > 0 && stats.memory["anon"] > 0);
        assert_eq!(stats.memory_max, u64::MAX);
        assert_eq!((stats.pids_current, stats.pids_max), (1, u64::MAX));
        assert_eq!(stats.memory_events["oom_kill"], 0);
    } else {
        skip("figures of memory and pids, for which cgroup v2 has no controllers here");
    }
    assert_eq!(bed.stats("no").await.unwrap_err().0, Code::NOT_FOUND);
}

pub async fn limits_are_changed_and_what_is_not_named_stays() {
    let bed = Bed::new().await;
    let mut spec = bed.spec("exec sleep 1000");
    let limited = bed.has_controller("memory") && bed.has_controller("pids");
    if limited {
        spec["linux"]["resources"] = json!({"memory": {"limit": 100 << 20}, "pids": {"limit": 50}});
    }
    bed.create("box", &spec, Stdio::default()).await.unwrap();
    bed.start("box").await.unwrap();
    for (resources, message) in [
        (
            json!({"pids": {"limit": "x"}}),
            "linux.resources.pids.limit: ",
        ),
        (json!("x"), "linux.resources: "),
        (
            json!({"unified": {"cgroup.procs": "1"}}),
            "linux.resources.unified",
        ),
        (
            json!({"unified": {"no.such": "1"}}),
            "linux.resources.unified",
        ),
    ] {
        let error = bed.update("box", &resources).await.unwrap_err();
        assert_eq!(error.0, Code::INVALID_ARGUMENT, "{error:?}");
        assert!(error.1.starts_with(message), "{}", error.1);
    }
    if limited {
        bed.update("box", &json!({"memory": {"limit": 50 << 20}}))
            .await
            .unwrap();
        let stats = bed.stats("box").await.unwrap();
        assert_eq!((stats.memory_max, stats.pids_max), (50 << 20, 50));
    } else {
        skip("limits, for which cgroup v2 has no controllers here");
    }
    bed.signal("box", 9, false).await.unwrap();
    bed.wait("box").await.unwrap();
    assert_eq!(
        bed.update("box", &json!({})).await.unwrap_err(),
        (
            Code::FAILED_PRECONDITION,
            "container not running".to_owned()
        )
    );
}

pub async fn a_kill_for_want_of_memory_is_told_and_deletion_ends_the_wait() {
    let bed = Bed::new().await;
    let mut spec = bed.spec("exec sleep 1000");
    let limited = bed.has_controller("memory");
    if limited {
        spec["linux"]["resources"] = json!({"memory": {"limit": 20 << 20}});
    }
    bed.create("box", &spec, Stdio::default()).await.unwrap();
    bed.start("box").await.unwrap();
    let mut seen = 0;
    if limited {
        let waiting = bed.wait_oom("box", 0);
        tokio::pin!(waiting);
        assert!(
            timeout(Duration::from_millis(100), &mut waiting)
                .await
                .is_err()
        );
        let process = bed.process("exec head -c 100000000 /dev/zero | sort > /dev/null");
        bed.run_exec("box", &process).await.unwrap();
        seen = waiting.await.unwrap();
        assert!(seen > 0);
        // What is known already is not told again.
        assert_eq!(bed.wait_oom("box", seen - 1).await.unwrap(), seen);
    } else {
        skip("a kill for want of memory, which cgroup v2 has no controller for here");
    }
    // Without a number that is known nothing is waited for.
    assert_eq!(bed.wait_oom("box", None).await.unwrap(), seen);
    let waiting = bed.wait_oom("box", seen);
    tokio::pin!(waiting);
    assert!(
        timeout(Duration::from_millis(100), &mut waiting)
            .await
            .is_err()
    );
    let (ended, deleted) = tokio::join!(waiting, bed.delete("box"));
    deleted.unwrap();
    assert_eq!(ended.unwrap_err().0, Code::NOT_FOUND);
    assert_eq!(bed.wait_oom("box", 0).await.unwrap_err().0, Code::NOT_FOUND);
}

/// `readlink` of a process's namespace.
fn namespace(pid: u32, kind: &str) -> std::path::PathBuf {
    fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap()
}

pub async fn namespaces_of_another_container_are_joined() {
    let bed = Bed::new().await;
    let pause = bed.running("pause").await;
    let mut spec = bed.spec(
        "hostname; ls -d /proc/[0-9]* | wc -l; ifconfig lo | grep -c UP; sleep 1000 & exit 3",
    );
    // As engines write them; where the paths lead is the host's affair.
    for namespace in spec["linux"]["namespaces"].as_array_mut().unwrap() {
        if namespace["type"] != "mount" && namespace["type"] != "cgroup" {
            namespace["path"] = json!("/proc/4711/ns/some");
        }
    }
    spec.as_object_mut().unwrap().remove("hostname");
    let join = [
        ("pid", "pause"),
        ("network", "pause"),
        ("ipc", "pause"),
        ("uts", "pause"),
    ];
    let pid = bed
        .create_joining("box", &spec, all_pipes(), &join)
        .await
        .unwrap();
    for kind in ["pid", "net", "ipc", "uts"] {
        assert_eq!(namespace(pid, kind), namespace(pause, kind), "{kind}");
    }
    for kind in ["mnt", "cgroup"] {
        assert_ne!(namespace(pid, kind), namespace(pause, kind), "{kind}");
    }
    let mut stdout = bed.stream("box", StreamKind::STDOUT).await;
    let _stderr = bed.stream("box", StreamKind::STDERR).await;
    // An exec joins what its container has joined.
    let process = bed.process("exec sleep 1000");
    let exec = bed.exec("box", "one", &process, Stdio::default()).await;
    let exec = exec.unwrap();
    for kind in ["pid", "net", "ipc", "uts", "mnt", "cgroup"] {
        assert_eq!(namespace(exec, kind), namespace(pid, kind), "{kind}");
    }
    bed.start("box").await.unwrap();
    let mut output = String::new();
    stdout.read_to_string(&mut output).await.unwrap();
    // sleep of the one, sleep of the exec, sh, ls, wc.
    assert!(
        output.starts_with("box\n5\n1\n") || output.starts_with("box\n4\n1\n"),
        "{output}"
    );
    // Its end takes its own with it, and the other container lives on.
    assert_eq!(bed.wait("box").await.unwrap().exit_code, 3);
    assert_eq!(bed.wait_exec("box", "one").await.unwrap().exit_code, 137);
    bed.delete("box").await.unwrap();
    assert_eq!(bed.processes("pause").await.unwrap().len(), 1);

    // With the owner of the pid namespace everything in it ends.
    let pid = bed
        .create_joining("box", &spec, Stdio::default(), &join)
        .await
        .unwrap();
    bed.signal("pause", 9, false).await.unwrap();
    assert_eq!(bed.wait("box").await.unwrap().exit_code, 137);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    let error = bed
        .create_joining("other", &spec, Stdio::default(), &join)
        .await
        .unwrap_err();
    assert_eq!(error.0, Code::FAILED_PRECONDITION, "{error:?}");
    assert!(!bed.cgroup_of("other").exists());
}

pub async fn a_user_namespace_of_another_container_is_joined() {
    let bed = Bed::new().await;
    let spec = in_user_namespace(&bed, "exec sleep 1000");
    let pause = bed.create("pause", &spec, Stdio::default()).await.unwrap();
    bed.start("pause").await.unwrap();
    let join = [("user", "pause"), ("network", "pause"), ("ipc", "pause")];
    // Its own pid namespace belongs to the user namespace, or /proc could not be mounted.
    let mut spec = in_user_namespace(
        &bed,
        "id -u; echo $$; touch /data/joined; ulimit -Hn; cat /proc/self/oom_score_adj",
    );
    spec["process"]["oomScoreAdj"] = json!(400);
    for maps in [true, false] {
        if !maps {
            let linux = spec["linux"].as_object_mut().unwrap();
            linux.remove("uidMappings");
            linux.remove("gidMappings");
        }
        let pid = bed
            .create_joining("box", &spec, all_pipes(), &join)
            .await
            .unwrap();
        for kind in ["user", "net", "ipc"] {
            assert_eq!(namespace(pid, kind), namespace(pause, kind), "{kind}");
        }
        assert_ne!(namespace(pid, "pid"), namespace(pause, "pid"));
        let mut stdout = bed.stream("box", StreamKind::STDOUT).await;
        let mut stderr = bed.stream("box", StreamKind::STDERR).await;
        bed.start("box").await.unwrap();
        let (mut output, mut errors) = (String::new(), String::new());
        stdout.read_to_string(&mut output).await.unwrap();
        stderr.read_to_string(&mut errors).await.unwrap();
        assert_eq!(
            (output.as_str(), errors.as_str()),
            ("0\n1\n1024\n400\n", "")
        );
        assert_eq!(bed.wait("box").await.unwrap().exit_code, 0);
        bed.delete("box").await.unwrap();
    }
    let owner = fs::metadata(bed.rootfs().join("data/joined")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&owner), 100_000);
    spec["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 5, "size": 1}]);
    spec["linux"]["gidMappings"] = json!([{"containerID": 0, "hostID": 5, "size": 1}]);
    let error = bed.create_joining("box", &spec, Stdio::default(), &join);
    let (_, message) = error.await.unwrap_err();
    assert!(message.starts_with("linux.uidMappings: "), "{message}");
}

pub async fn a_container_with_a_user_namespace_joins_a_network_of_the_guest() {
    let bed = Bed::new().await;
    // The owner of the network namespace has no user namespace: in its own the container has no say there.
    let pause = bed.running("pause").await;
    let mut spec = in_user_namespace(&bed, "exec sleep 1000");
    // Nor may it mount a sysfs, which shows the network.
    spec["mounts"]
        .as_array_mut()
        .unwrap()
        .retain(|mount| !mount["destination"].as_str().unwrap().starts_with("/sys"));
    let pid = bed
        .create_joining("box", &spec, Stdio::default(), &[("network", "pause")])
        .await
        .unwrap();
    assert_eq!(namespace(pid, "net"), namespace(pause, "net"));
    assert_ne!(namespace(pid, "user"), namespace(pause, "user"));
    bed.start("box").await.unwrap();
    let process = bed.process("id -u; ifconfig lo | grep -c UP");
    assert_eq!(bed.exec_output("box", &process).await, "0\n1\n");
}

pub async fn joins_that_cannot_be_are_refused_and_leave_nothing() {
    let bed = Bed::new().await;
    let spec = bed.spec("true");
    bed.running("pause").await;
    for (join, code) in [
        (&[("pid", "no")][..], Code::NOT_FOUND),
        (&[("pid", "box")], Code::NOT_FOUND),
        (&[("shapes", "pause")], Code::INVALID_ARGUMENT),
        (&[("", "pause")], Code::INVALID_ARGUMENT),
        (
            &[("pid", "pause"), ("pid", "pause")],
            Code::INVALID_ARGUMENT,
        ),
        (&[("mount", "pause")], Code::INVALID_ARGUMENT),
        (&[("user", "pause")], Code::INVALID_ARGUMENT),
    ] {
        let error = bed
            .create_joining("box", &spec, Stdio::default(), join)
            .await
            .unwrap_err();
        assert_eq!(error.0, code, "{error:?}");
    }
    let mut missing = spec.clone();
    missing["process"]["args"] = json!(["nothing"]);
    let error = bed.create_joining("box", &missing, Stdio::default(), &[("pid", "pause")]);
    assert_eq!(error.await.unwrap_err().0, Code::NOT_FOUND);
    let mut path = spec.clone();
    path["linux"]["namespaces"][1]["path"] = json!("/proc/1/ns/net");
    let (code, message) = bed
        .create("box", &path, Stdio::default())
        .await
        .unwrap_err();
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(
        message.starts_with("linux.namespaces[1].path: "),
        "{message}"
    );
    assert_eq!(bed.cgroups(), 1);
}

pub async fn a_container_that_divides_its_cgroup_can_still_be_joined() {
    let bed = Bed::new().await;
    if !bed.has_controller("pids") {
        skip("a divided cgroup, for which cgroup v2 has no controllers here");
        return;
    }
    // As systemd does: itself into a leaf, controllers for the leaves.
    let script = "cd /sys/fs/cgroup; mkdir init; echo 1 > init/cgroup.procs; echo +pids > cgroup.subtree_control; \
                  echo ready; exec sleep 1000";
    let mut spec = bed.spec(script);
    spec["mounts"][6]["options"] = json!(["nosuid", "noexec", "nodev"]);
    bed.create("box", &spec, all_pipes()).await.unwrap();
    let mut stdout = bed.stream("box", StreamKind::STDOUT).await;
    let _stderr = bed.stream("box", StreamKind::STDERR).await;
    bed.start("box").await.unwrap();
    stdout.read_exact(&mut [0; 6]).await.unwrap();
    let output = bed
        .exec_output("box", &bed.process("cat /proc/self/cgroup"))
        .await;
    assert_eq!(output, "0::/init\n");
    let own = bed.process("mkdir /sys/fs/cgroup/leaf");
    bed.exec_output("box", &own).await;
    let process = bed.process("cat /proc/self/cgroup");
    bed.exec_below("box", "below", "/leaf", &process, all_pipes())
        .await
        .unwrap();
    let mut stdout = bed.stream_of("box", "below", StreamKind::STDOUT).await;
    let _stderr = bed.stream_of("box", "below", StreamKind::STDERR).await;
    let mut output = String::new();
    stdout.read_to_string(&mut output).await.unwrap();
    assert_eq!(output, "0::/leaf\n");
    for (path, code) in [
        ("/", Code::INTERNAL),
        ("gone", Code::NOT_FOUND),
        ("leaf/../..", Code::INVALID_ARGUMENT),
    ] {
        let refused = bed
            .exec_below("box", "refused", path, &process, Stdio::default())
            .await;
        assert_eq!(refused.unwrap_err().0, code, "{path}");
    }
    bed.delete("box").await.unwrap();
}

pub async fn a_container_that_nests_cgroups_without_end_can_be_deleted() {
    let bed = Bed::new().await;
    let name = "x".repeat(200);
    let script = format!(
        "cd /sys/fs/cgroup; n=0; while [ $n -lt 1000 ] && mkdir {name} 2>/dev/null; do cd -P {name}; n=$((n+1)); done; \
         echo $n; exec sleep 1000"
    );
    let mut spec = bed.spec(&script);
    spec["mounts"][6]["options"] = json!(["nosuid", "noexec", "nodev"]);
    bed.create("box", &spec, all_pipes()).await.unwrap();
    let mut stdout = bed.stream("box", StreamKind::STDOUT).await;
    let _stderr = bed.stream("box", StreamKind::STDERR).await;
    bed.start("box").await.unwrap();
    let mut levels = [0; 3];
    stdout.read_exact(&mut levels).await.unwrap();
    assert_eq!(&levels, b"64\n");
    bed.delete("box").await.unwrap();
    assert_eq!(bed.cgroups(), 0);
}

pub async fn streams_of_an_exec_close_both_ways() {
    let bed = Bed::new().await;
    bed.running("box").await;
    // The host reads no more: the writer is told.
    let stdio = Stdio {
        stdout: true,
        ..Default::default()
    };
    let process = bed.process("while :; do echo x; done");
    bed.exec("box", "one", &process, stdio).await.unwrap();
    let mut stdout = bed.stream_of("box", "one", StreamKind::STDOUT).await;
    stdout.read_exact(&mut [0; 2]).await.unwrap();
    drop(stdout);
    assert_eq!(
        bed.wait_exec("box", "one").await.unwrap().exit_code,
        128 + 13
    );

    // The process reads no more: the host is told. It writes no more of one stream, and goes on with the other.
    let process = bed.process("exec 0<&- 1>&-; sleep 0.1; echo still here >&2; exec sleep 1000");
    bed.exec("box", "two", &process, all_pipes()).await.unwrap();
    let mut stdin = bed.stream_of("box", "two", StreamKind::STDIN).await;
    let mut stdout = bed.stream_of("box", "two", StreamKind::STDOUT).await;
    let mut stderr = bed.stream_of("box", "two", StreamKind::STDERR).await;
    // The host says nothing more of what it reads, which is no news.
    stderr.shutdown().await.unwrap();
    assert_eq!(stdout.read(&mut [0; 1]).await.unwrap(), 0);
    while stdin.write_all(&[0; 4096]).await.is_ok() {}
    let mut text = [0; 11];
    stderr.read_exact(&mut text).await.unwrap();
    assert_eq!(&text, b"still here\n");
    bed.signal_exec("box", "two", 9).await.unwrap();
    assert_eq!(bed.wait_exec("box", "two").await.unwrap().exit_code, 137);
}

pub async fn a_container_is_deleted_once_however_often_that_is_asked() {
    let bed = Bed::new().await;
    for _ in 0..20 {
        bed.running("box").await;
        let deletions = futures::future::join_all((0..4).map(|_| bed.delete("box"))).await;
        let done = deletions.iter().filter(|result| result.is_ok()).count();
        assert_eq!(done, 1, "{deletions:?}");
    }
}

pub async fn execs_at_once_do_not_mix() {
    let bed = Bed::new().await;
    bed.running("box").await;
    let runs = (0..30).map(|number: u32| {
        let bed = &bed;
        async move {
            let id = format!("exec-{number}");
            let process = bed.process(&format!("echo {number}; exit {number}"));
            bed.exec("box", &id, &process, all_pipes()).await.unwrap();
            let mut stdout = bed.stream_of("box", &id, StreamKind::STDOUT).await;
            let _stderr = bed.stream_of("box", &id, StreamKind::STDERR).await;
            let mut output = String::new();
            stdout.read_to_string(&mut output).await.unwrap();
            assert_eq!(output, format!("{number}\n"));
            let exit = bed.wait_exec("box", &id).await.unwrap();
            assert_eq!(exit.exit_code, number);
            bed.delete_exec("box", &id).await.unwrap();
        }
    });
    futures::future::join_all(runs).await;
    assert_eq!(bed.processes("box").await.unwrap().len(), 1);
}

pub async fn a_deletion_amid_execs_leaves_nothing() {
    let bed = Bed::new().await;
    let process = bed.process("exec sleep 1000");
    for _ in 0..15 {
        bed.running("box").await;
        let ids: Vec<_> = (0..10).map(|number| format!("exec-{number}")).collect();
        let execs = ids
            .iter()
            .map(|id| bed.exec("box", id, &process, all_pipes()));
        let (results, deleted) = tokio::join!(futures::future::join_all(execs), async {
            bed.exec("box", "first", &process, Stdio::default())
                .await
                .ok();
            bed.delete("box").await
        });
        deleted.unwrap();
        for error in results.into_iter().filter_map(Result::err) {
            let expected = [Code::FAILED_PRECONDITION, Code::NOT_FOUND, Code::INTERNAL];
            assert!(expected.contains(&error.0), "{error:?}");
        }
    }
    assert_eq!(bed.cgroups(), 0);
    bed.without_children().await;
}
