//! Whole containers, by the agent's real server over unix sockets: real namespaces, mounts, cgroups and streams,
//! without a guest. Needs root, cgroup v2 and busybox-static.

// Clippy takes a target with its own main for a program.
#![allow(clippy::unwrap_used)]

mod bed;
mod descriptors;
mod life;
mod mounts;
mod processes;
mod terminals;

use std::cell::Cell;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::time::Duration;

use bed::{AGENT_MODE, Bed, all_pipes};
use bulkhead_agent::sys::open_process;
use bulkhead_protocol::agent::{
    ForgetFilesRequest, HelloRequest, ShutdownRequest, Stdio, StreamKind,
};
use descriptors::*;
use futures::FutureExt;
use life::*;
use mounts::*;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;
use processes::*;
use serde_json::json;
use terminals::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;
use ttrpc::Code;
use ttrpc::context::Context;

/// Far more than any of it takes.
const PATIENCE: Duration = Duration::from_secs(120);

macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        fn main() {
            let mut arguments = std::env::args().skip(1);
            let first = arguments.next();
            if first.as_deref() == Some(AGENT_MODE) {
                let (Some(dir), Some(cgroup)) = (arguments.next(), arguments.next()) else {
                    panic!("{AGENT_MODE} DIR CGROUP");
                };
                let how = arguments.next();
                return bed::be_the_agent(Path::new(&dir), Path::new(&cgroup), how.as_deref());
            }
            let filters: Vec<String> = first
                .into_iter()
                .chain(arguments)
                .filter(|argument| !argument.starts_with('-'))
                .collect();
            let wanted = |name: &str| filters.is_empty() || filters.iter().any(|filter| name.contains(filter));
            assert!(nix::unistd::geteuid().is_root(), "the tests need root");
            assert!(Path::new("/bin/busybox").exists(), "the tests need busybox-static");
            let (mut passed, mut failed, mut filtered) = (0, 0, 0);
            $(
                if wanted(stringify!($name)) {
                    let ok = run(stringify!($name), $name());
                    if ok { passed += 1 } else { failed += 1 }
                } else {
                    filtered += 1;
                }
            )*
            let result = if failed == 0 { "ok" } else { "FAILED" };
            println!(
                "\ntest result: {result}. {passed} passed; {failed} failed; 0 ignored; 0 measured; {filtered} filtered out\n"
            );
            std::process::exit(i32::from(failed != 0));
        }
    };
}

thread_local! {
    /// The test that runs.
    static TEST: Cell<&'static str> = const { Cell::new("") };
}

/// Says what a test leaves out, and why, for who counts the tests.
pub fn skip(what: &str) {
    println!("SKIPPED: {}: {what}", TEST.get());
}

fn run(name: &'static str, test: impl Future<Output = ()>) -> bool {
    TEST.set(name);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let ok = runtime.block_on(async {
        let bounded = AssertUnwindSafe(timeout(PATIENCE, test))
            .catch_unwind()
            .await;
        match bounded {
            Ok(Ok(())) => true,
            Ok(Err(_)) => {
                eprintln!("{name}: took more than {PATIENCE:?}");
                false
            }
            Err(_) => false,
        }
    });
    println!("test {name} ... {}", if ok { "ok" } else { "FAILED" });
    ok
}

tests![
    output_errors_and_exit_code_come_back,
    a_signal_ends_a_process_with_128_plus_its_number,
    input_goes_through_and_ends,
    a_process_sees_its_own_world,
    the_user_the_groups_and_the_home_are_the_specs,
    capabilities_and_limits_are_the_specs,
    the_default_devices_and_links_are_there,
    devices_outside_the_rules_cannot_be_used,
    paths_are_masked_and_read_only,
    a_read_only_root_is_read_only,
    binds_of_files_and_directories,
    a_hostile_image_does_not_lead_mounts_out,
    a_proc_that_is_a_link_is_refused,
    no_descriptor_leaks_into_the_container,
    a_stream_not_asked_for_is_the_null_device,
    a_missing_program_is_said_at_create_in_runcs_words,
    a_broken_program_is_said_at_start,
    a_working_directory_is_made_and_a_bad_one_is_named,
    mounts_that_fail_say_which_and_why,
    nothing_runs_before_start,
    a_created_containers_program_is_read_before_its_start,
    a_created_container_ends_on_request,
    start_needs_a_created_container,
    signals_reach_the_process,
    a_deleted_container_leaves_nothing,
    what_is_made_ahead_is_the_first_containers_alone,
    a_failed_creation_leaves_nothing,
    an_unattached_output_waits_for_its_deletion_only,
    what_a_container_without_its_own_pids_leaves_is_killed,
    what_loses_its_parent_is_reaped,
    calls_before_hello_and_other_versions_are_refused,
    ids_are_checked_and_taken_once,
    unknown_containers_and_execs_are_not_found,
    a_terminal_is_a_terminal,
    the_end_of_the_control_connection_ends_everything,
    shutdown_ends_everything_with_an_answer,
    a_hundred_life_cycles_leak_nothing,
    a_process_joins_a_container,
    the_user_limits_and_capabilities_of_an_exec_are_its_own_or_the_containers,
    an_exec_is_never_seen_with_more_capabilities_than_its_own,
    failures_of_an_exec_are_said_in_runcs_words_and_leave_nothing,
    a_working_directory_outside_the_root_is_refused,
    exec_ids_are_taken_once_and_free_after_deletion,
    an_exec_has_its_own_streams_signals_and_exit_code,
    the_exit_of_an_exec_comes_after_its_last_byte_and_does_not_wait_for_its_background,
    a_slow_reader_slows_an_exec,
    an_exec_ends_with_its_container,
    deleting_a_container_forgets_its_execs,
    a_stopped_container_refuses_an_exec,
    terminals_are_resized,
    a_terminal_of_an_exec_is_in_the_containers_devpts,
    an_exec_without_new_namespaces_joins_too,
    a_thousand_execs_leak_nothing,
    a_process_joins_a_user_namespace,
    a_process_joins_under_the_profile_of_its_container,
    a_paused_container_stands_still,
    a_paused_container_can_be_killed_and_deleted,
    processes_are_listed_with_their_exec_ids_wherever_their_cgroup_is,
    the_figures_of_a_container_are_its_cgroups,
    limits_are_changed_and_what_is_not_named_stays,
    a_kill_for_want_of_memory_is_told_and_deletion_ends_the_wait,
    namespaces_of_another_container_are_joined,
    a_user_namespace_of_another_container_is_joined,
    a_container_with_a_user_namespace_joins_a_network_of_the_guest,
    joins_that_cannot_be_are_refused_and_leave_nothing,
    a_container_that_divides_its_cgroup_can_still_be_joined,
    a_container_that_nests_cgroups_without_end_can_be_deleted,
    streams_of_an_exec_close_both_ways,
    a_container_is_deleted_once_however_often_that_is_asked,
    execs_at_once_do_not_mix,
    a_deletion_amid_execs_leaves_nothing,
    a_profile_as_large_as_the_engines_default_lets_programs_run_and_refuses_the_rest,
    a_profile_holds_with_and_without_new_privileges,
    a_profile_that_knows_newer_calls_but_no_faccessat2_lets_programs_run,
    a_profile_that_forbids_the_exec_is_said_at_start,
    a_user_namespace_maps_the_users_and_owns_everything,
    a_user_namespace_binds_what_others_may_not_reach,
    the_cgroup_of_a_user_namespace_belongs_to_its_root,
    a_user_namespace_without_a_cgroup_namespace_sees_the_cgroups,
    maps_that_the_kernel_refuses_are_named,
    the_clocks_have_their_offsets,
    a_remount_changes_what_is_mounted,
    a_remount_does_not_reach_the_guests_file_systems,
    a_tmpfs_begins_with_what_it_covers,
    a_read_only_tmpfs_holds_places_for_mounts,
    nothing_but_procfs_is_mounted_over_proc,
    ids_of_a_bind_mount_are_mapped,
    masks_follow_links_inside_the_root_only,
    sysfs_mounts_without_a_network_namespace,
    limits_are_set_before_anything_runs,
    start_hooks_run_in_the_container_right_before_the_program,
    a_start_hook_that_fails_ends_the_start,
    the_scheduler_is_the_specs,
    a_terminal_of_unknown_size_has_the_specs,
    processes_join_a_container_of_every_kind_of_namespace,
    the_kernel_is_told_to_forget_files_and_no_child_is_left,
    while_the_kernel_forgets_files_the_agent_serves_and_what_it_closes_is_closed,
    descriptors_are_there_by_their_numbers,
    descriptors_carry_bytes_whole_and_end,
    descriptors_leave_room_for_what_an_init_needs_itself,
    a_reader_of_a_descriptor_that_goes_away_ends_the_writer,
    an_exit_comes_after_the_last_byte_of_every_descriptor,
    a_terminal_that_nobody_has_open_can_be_opened_again,
    who_holds_a_terminal_does_not_hold_up_the_end_of_its_process,
    who_writes_on_does_not_hold_up_the_end_of_a_process,
    the_propagation_of_a_mount_is_its_own_whatever_the_roots,
    what_is_mounted_below_a_read_only_path_stays_writable,
    what_is_mounted_below_a_volume_is_not_found_through_its_links,
    a_proc_that_is_a_link_is_refused_however_it_is_spelled,
    the_guests_null_device_cannot_be_changed_through_its_copies,
    a_multiplexer_of_terminals_among_the_devices_is_passed_over,
    a_slow_volume_holds_up_nobody_but_its_container,
    a_profile_may_refuse_what_a_process_needs_only_to_become_the_user,
    the_scheduler_is_that_of_the_process_that_is_executed,
    the_numbers_of_the_hosts_processors_mean_nothing_to_processes_that_join,
    processes_that_join_share_the_session_keyring,
    the_home_directory_is_found_among_names_of_any_encoding,
    an_init_that_has_left_its_cgroup_ends_with_its_container,
    a_signal_for_all_reaches_those_that_are_forked_meanwhile,
    a_paused_container_stays_so_when_a_signal_for_all_comes,
    a_hook_may_have_all_the_time_there_is,
];

async fn output_errors_and_exit_code_come_back() {
    let bed = Bed::new().await;
    let outcome = bed.run(&bed.spec("echo out; echo err >&2; exit 7")).await;
    assert_eq!(
        (
            outcome.code,
            outcome.stdout.as_str(),
            outcome.stderr.as_str()
        ),
        (7, "out\n", "err\n")
    );
}

async fn a_signal_ends_a_process_with_128_plus_its_number() {
    let bed = Bed::new().await;
    // 34 is a real-time signal; init's own pid namespace shields it from all but SIGKILL.
    for signal in [9, 34] {
        let mut spec = bed.spec("sleep 1000");
        let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| signal == 9 || namespace["type"] != "pid");
        bed.create("box", &spec, Stdio::default()).await.unwrap();
        bed.start("box").await.unwrap();
        bed.signal("box", signal, false).await.unwrap();
        assert_eq!(bed.wait("box").await.unwrap().exit_code, 128 + signal);
        bed.delete("box").await.unwrap();
    }
}

async fn input_goes_through_and_ends() {
    let bed = Bed::new().await;
    let input: Vec<u8> = (0..3_000_000)
        .map(|number: u32| b'a' + (number % 23) as u8)
        .collect();
    let outcome = bed.run_with(&bed.spec("cat"), &input).await.unwrap();
    assert_eq!(outcome.code, 0);
    assert!(outcome.stdout.as_bytes() == input);
}

async fn a_process_sees_its_own_world() {
    let bed = Bed::new().await;
    let script = "echo $$; hostname; ls -d /proc/[0-9]*; pwd; echo $PATH; ls /; cat /proc/self/cgroup; \
                  ifconfig lo | grep -c UP; echo $((0$(umask)))";
    let mut spec = bed.spec(script);
    spec["process"]["cwd"] = json!("/tmp");
    let output = bed.output(&spec).await;
    let lines: Vec<_> = output.lines().collect();
    assert_eq!(lines.first(), Some(&"1"));
    assert_eq!(lines.get(1), Some(&"box"));
    assert!(output.contains("/proc/1\n"), "{output}");
    assert!(
        lines
            .iter()
            .filter(|line| line.starts_with("/proc/"))
            .count()
            <= 2,
        "{output}"
    );
    assert!(
        lines.contains(&"/tmp") && lines.contains(&"/bin"),
        "{output}"
    );
    assert!(lines.contains(&"0::/"), "{output}");
    assert_eq!(
        lines.get(lines.len() - 2..),
        Some(&["1", "18"][..]),
        "{output}"
    );
}

async fn the_user_the_groups_and_the_home_are_the_specs() {
    let bed = Bed::new().await;
    let mut spec = bed
        .spec("id -u; id -g; id -G; echo $HOME; umask; echo x > /dev/stderr; echo y > /dev/stdout");
    spec["process"]["user"] =
        json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 6], "umask": 0o027});
    let outcome = bed.run(&spec).await;
    assert_eq!(outcome.stdout, "1000\n1001\n1001 5 6\n/home/me\n0027\ny\n");
    assert_eq!(outcome.stderr, "x\n");
    let mut spec = bed.spec("echo $HOME");
    spec["process"]["env"] = json!(["PATH=/bin", "HOME=/elsewhere"]);
    assert_eq!(bed.output(&spec).await, "/elsewhere\n");
    spec["process"]["env"] = json!(["PATH=/bin"]);
    spec["process"]["user"] = json!({"uid": 77, "gid": 77});
    assert_eq!(bed.output(&spec).await, "/\n");
}

async fn capabilities_and_limits_are_the_specs() {
    let bed = Bed::new().await;
    let script = "grep -E 'Cap|NoNewPrivs' /proc/self/status; ulimit -Sn; ulimit -Hn; cat /proc/self/oom_score_adj";
    let mut spec = bed.spec(script);
    spec["process"]["oomScoreAdj"] = json!(123);
    let output = bed.output(&spec).await;
    let fields: Vec<_> = output.split_whitespace().collect();
    // CAP_KILL is 5, CAP_NET_BIND_SERVICE 10.
    let set = "0000000000000420";
    let none = "0000000000000000";
    assert_eq!(
        fields,
        [
            "CapInh:",
            none,
            "CapPrm:",
            set,
            "CapEff:",
            set,
            "CapBnd:",
            set,
            "CapAmb:",
            none,
            "NoNewPrivs:",
            "1",
            "512",
            "1024",
            "123"
        ]
    );
    let mut spec = bed.spec("grep -E 'CapInh|CapPrm|CapAmb' /proc/self/status");
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    for name in ["inheritable", "ambient"] {
        spec["process"]["capabilities"][name] = json!(["CAP_KILL"]);
    }
    let output = bed.output(&spec).await;
    let ambient = "0000000000000020";
    let fields: Vec<_> = output.split_whitespace().collect();
    assert_eq!(
        fields,
        ["CapInh:", ambient, "CapPrm:", ambient, "CapAmb:", ambient]
    );
    let mut spec = bed.spec("grep CapBnd /proc/self/status");
    spec["process"]
        .as_object_mut()
        .unwrap()
        .remove("capabilities");
    assert_eq!(bed.output(&spec).await, format!("CapBnd:\t{none}\n"));
}

async fn the_default_devices_and_links_are_there() {
    let bed = Bed::new().await;
    let script = "cd /dev; stat -c '%n %t:%T %a' null zero full random urandom tty extra; \
                  for link in fd stdin stdout stderr ptmx; do readlink $link; done; echo x > null; head -c 3 zero | wc -c; ls -d shm mqueue pts";
    let mut spec = bed.spec(script);
    spec["linux"]["devices"] = json!([
        {"path": "/dev/extra", "type": "c", "major": 10, "minor": 229, "fileMode": 0o640, "uid": 3, "gid": 4},
        {"path": "/dev/sub/fifo", "type": "p"}
    ]);
    let output = bed.output(&spec).await;
    assert_eq!(
        output,
        "null 1:3 666\nzero 1:5 666\nfull 1:7 666\nrandom 1:8 666\nurandom 1:9 666\ntty 5:0 666\nextra a:e5 640\n\
         /proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\npts/ptmx\n3\nmqueue\npts\nshm\n"
    );
}

async fn devices_outside_the_rules_cannot_be_used() {
    check_devices(&Bed::new().await).await;
    check_devices(&Bed::ahead().await).await;
}

async fn check_devices(bed: &Bed) {
    // The kernel's log: present everywhere, and no default device.
    let mut spec =
        bed.spec("head -c 1 /dev/log-node > /dev/null && echo read; head -c 1 /dev/zero | wc -c");
    spec["linux"]["devices"] =
        json!([{"path": "/dev/log-node", "type": "c", "major": 1, "minor": 11}]);
    for set in ["bounding", "effective", "permitted"] {
        spec["process"]["capabilities"][set] = json!(["CAP_SYSLOG"]);
    }
    let denied = bed.run(&spec).await;
    assert_eq!(denied.stdout, "1\n");
    assert!(
        denied.stderr.contains("Operation not permitted"),
        "{}",
        denied.stderr
    );
    spec["linux"]["resources"]["devices"] = json!([
        {"allow": false, "access": "rwm"},
        {"allow": true, "type": "c", "major": 1, "minor": 11, "access": "r"}
    ]);
    assert_eq!(bed.output(&spec).await, "read\n1\n");
}

async fn paths_are_masked_and_read_only() {
    let bed = Bed::new().await;
    fs::create_dir(bed.rootfs().join("secrets")).unwrap();
    fs::write(bed.rootfs().join("secrets/a"), "secret").unwrap();
    fs::write(bed.rootfs().join("secret"), "secret").unwrap();
    fs::write(bed.rootfs().join("data/fixed"), "fixed").unwrap();
    let mut spec = bed.spec(
        "ls /secrets; cat /secret; cat /data/fixed; touch /data/x 2>&1; touch /secrets/x 2>&1; touch /tmp/x; \
         echo 1 2>&1 > /proc/sys/kernel/panic",
    );
    spec["linux"]["maskedPaths"] = json!(["/secrets", "/secret", "/nowhere", "/data/fixed/below"]);
    spec["linux"]["readonlyPaths"] = json!(["data", "/nowhere", "/proc/sys"]);
    let outcome = bed.run(&spec).await;
    assert!(!outcome.stdout.contains("secret\n"), "{}", outcome.stdout);
    let all = outcome.stdout + &outcome.stderr;
    assert_eq!(all.matches("Read-only file system").count(), 3, "{all}");
    assert!(all.starts_with("fixed"), "{all}");
}

async fn a_read_only_root_is_read_only() {
    let bed = Bed::new().await;
    let mut spec = bed.spec("touch /x || touch /dev/shm/y; touch /dev/z || echo both");
    spec["root"]["readonly"] = json!(true);
    spec["mounts"][1]["options"] = json!(["mode=755", "ro"]);
    let outcome = bed.run(&spec).await;
    assert_eq!(
        (outcome.code, outcome.stdout.as_str()),
        (0, "both\n"),
        "{}",
        outcome.stderr
    );
    assert_eq!(
        outcome.stderr.matches("Read-only file system").count(),
        2,
        "{}",
        outcome.stderr
    );
}

async fn binds_of_files_and_directories() {
    let bed = Bed::new().await;
    let source = bed.dir().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "hello\n").unwrap();
    let mut spec = bed.spec(
        "cat /new/place/file /etc/one; echo more > /new/place/other; touch /ro/x; cat /ro/file",
    );
    for mount in [
        json!({"destination": "/new/place", "type": "bind", "source": source, "options": ["rbind", "rslave"]}),
        json!({"destination": "/etc/one", "type": "none", "source": source.join("file"), "options": ["bind", "ro"]}),
        json!({"destination": "/ro", "source": source, "options": ["bind", "ro", "nosuid", "noatime", "rro"]}),
    ] {
        spec["mounts"].as_array_mut().unwrap().push(mount);
    }
    let outcome = bed.run(&spec).await;
    assert_eq!(
        outcome.stdout, "hello\nhello\nhello\n",
        "{}",
        outcome.stderr
    );
    assert!(
        outcome.stderr.contains("/ro/x: Read-only file system"),
        "{}",
        outcome.stderr
    );
    assert_eq!(fs::read_to_string(source.join("other")).unwrap(), "more\n");
}

async fn a_hostile_image_does_not_lead_mounts_out() {
    let bed = Bed::new().await;
    let outside = bed.dir().join("outside");
    fs::create_dir(&outside).unwrap();
    symlink(&outside, bed.rootfs().join("absolute")).unwrap();
    symlink(
        "../../../../../../../../outside",
        bed.rootfs().join("data/relative"),
    )
    .unwrap();
    symlink("/proc/1/root", bed.rootfs().join("magic")).unwrap();
    let mut spec = bed.spec("ls /outside/deep; true");
    for destination in ["/absolute/made", "/data/relative/deep"] {
        let mount = json!({"destination": destination, "type": "tmpfs", "source": "tmpfs"});
        spec["mounts"].as_array_mut().unwrap().push(mount);
    }
    assert_eq!(bed.output(&spec).await, "");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    assert!(!Path::new("/outside").exists());

    let mount = json!({"destination": "/magic/tmp", "type": "tmpfs", "source": "tmpfs"});
    spec["mounts"].as_array_mut().unwrap().push(mount);
    let (_, message) = bed
        .create("box", &spec, Stdio::default())
        .await
        .unwrap_err();
    assert!(message.contains("/magic/tmp"), "{message}");
}

async fn a_proc_that_is_a_link_is_refused() {
    let bed = Bed::new().await;
    symlink("data", bed.rootfs().join("proc")).unwrap();
    let (code, message) = bed
        .create("box", &bed.spec("true"), Stdio::default())
        .await
        .unwrap_err();
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert_eq!(
        message,
        "mounts[0] (/proc): proc must be mounted on ordinary directory"
    );
}

async fn no_descriptor_leaks_into_the_container() {
    let bed = Bed::new().await;
    // 3 is the directory that ls reads.
    assert_eq!(
        bed.output(&bed.spec("exec ls /proc/self/fd")).await,
        "0\n1\n2\n3\n"
    );
}

async fn a_stream_not_asked_for_is_the_null_device() {
    let bed = Bed::new().await;
    let stdio = Stdio {
        stdout: true,
        ..Default::default()
    };
    let spec = bed.spec("readlink /proc/self/fd/0; readlink /proc/self/fd/2; cat; echo end");
    bed.create("box", &spec, stdio).await.unwrap();
    let mut stdout = bed.stream("box", StreamKind::STDOUT).await;
    bed.start("box").await.unwrap();
    let mut output = String::new();
    stdout.read_to_string(&mut output).await.unwrap();
    assert_eq!(output, "/dev/null\n/dev/null\nend\n");
    assert_eq!(bed.wait("box").await.unwrap().exit_code, 0);
}

async fn a_missing_program_is_said_at_create_in_runcs_words() {
    let bed = Bed::new().await;
    symlink("loop", bed.rootfs().join("bin/loop")).unwrap();
    let mut spec = bed.spec("");
    for (args, code, message) in [
        (
            json!(["nothing"]),
            Code::NOT_FOUND,
            "exec: \"nothing\": executable file not found in $PATH",
        ),
        (
            json!(["/x/y"]),
            Code::NOT_FOUND,
            "exec: \"/x/y\": stat /x/y: no such file or directory",
        ),
        (
            json!(["/etc/plain"]),
            Code::PERMISSION_DENIED,
            "exec: \"/etc/plain\": permission denied",
        ),
        (
            json!(["/etc/plain/x"]),
            Code::INVALID_ARGUMENT,
            "exec: \"/etc/plain/x\": stat /etc/plain/x: not a directory",
        ),
        (
            json!(["/bin/loop"]),
            Code::INVALID_ARGUMENT,
            "exec: \"/bin/loop\": stat /bin/loop: too many levels of symbolic links",
        ),
        (
            json!([""]),
            Code::NOT_FOUND,
            "exec: \"\": executable file not found in $PATH",
        ),
        (
            json!(["/etc"]),
            Code::PERMISSION_DENIED,
            "exec: \"/etc\": permission denied",
        ),
    ] {
        spec["process"]["args"] = args;
        let error = bed
            .create("box", &spec, Stdio::default())
            .await
            .unwrap_err();
        assert_eq!(error, (code, message.to_owned()));
    }
}

async fn a_broken_program_is_said_at_start() {
    let bed = Bed::new().await;
    let broken = bed.rootfs().join("bin/broken");
    fs::write(&broken, "\0\0\0").unwrap();
    fs::set_permissions(&broken, fs::Permissions::from_mode(0o755)).unwrap();
    let mut spec = bed.spec("");
    spec["process"]["args"] = json!(["broken"]);
    bed.create("box", &spec, Stdio::default()).await.unwrap();
    let (_, message) = bed.start("box").await.unwrap_err();
    assert_eq!(message, "exec /bin/broken: exec format error");
    assert_eq!(bed.wait("box").await.unwrap().exit_code, 1);
    bed.delete("box").await.unwrap();
}

async fn a_working_directory_is_made_and_a_bad_one_is_named() {
    let bed = Bed::new().await;
    let mut spec = bed.spec("pwd");
    spec["process"]["cwd"] = json!("/made/for/it");
    assert_eq!(bed.output(&spec).await, "/made/for/it\n");
    for (cwd, words) in [
        ("/etc/passwd", "mkdir /etc/passwd: not a directory"),
        ("/etc/passwd/x/y", "mkdir /etc/passwd: not a directory"),
    ] {
        spec["process"]["cwd"] = json!(cwd);
        let error = bed
            .create("box", &spec, Stdio::default())
            .await
            .unwrap_err();
        assert_eq!(error, (Code::INVALID_ARGUMENT, words.to_owned()));
    }
}

async fn mounts_that_fail_say_which_and_why() {
    let bed = Bed::new().await;
    let missing = bed.dir().join("missing");
    for (mount, code, expected) in [
        (
            json!({"destination": "/x", "type": "nosuchfs", "source": "x"}),
            Code::INVALID_ARGUMENT,
            "mounts[7] (/x): the guest's kernel has no file system \"nosuchfs\"".to_owned(),
        ),
        (
            json!({"destination": "/x", "type": "tmpfs", "source": "x", "options": ["size=many"]}),
            Code::INVALID_ARGUMENT,
            "mounts[7] (/x): cannot mount tmpfs: ".to_owned(),
        ),
        (
            json!({"destination": "/x", "source": missing, "options": ["bind"]}),
            Code::NOT_FOUND,
            format!(
                "mounts[7] (/x): source {}: no such file or directory",
                missing.display()
            ),
        ),
        (
            json!({"destination": "/etc/plain/x", "type": "tmpfs"}),
            Code::INVALID_ARGUMENT,
            "mounts[7] (/etc/plain/x): cannot make the destination: not a directory".to_owned(),
        ),
    ] {
        let mut spec = bed.spec("true");
        spec["mounts"].as_array_mut().unwrap().push(mount);
        let (got, message) = bed
            .create("box", &spec, Stdio::default())
            .await
            .unwrap_err();
        assert!(message.starts_with(&expected), "{message}");
        assert_eq!(got, code, "{message}");
    }
    let mut spec = bed.spec("true");
    spec["root"]["path"] = json!("/run/bulkhead/share/c1/rootfs");
    let (code, message) = bed
        .create("box", &spec, Stdio::default())
        .await
        .unwrap_err();
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(message.contains("virtio-fs share"), "{message}");
    spec["root"]["path"] = json!(missing);
    let (code, message) = bed
        .create("box", &spec, Stdio::default())
        .await
        .unwrap_err();
    assert_eq!(code, Code::NOT_FOUND);
    assert!(message.starts_with("root.path ("), "{message}");
}

async fn a_created_containers_program_is_read_before_its_start() {
    let bed = Bed::new().await;
    let program = bed.rootfs().join("bin/busybox");
    // What reading it costs this process in bytes from the disk, when nobody has read it before.
    let forget = || {
        let file = fs::File::open(&program).unwrap();
        file.sync_all().unwrap();
        let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        nix::fcntl::posix_fadvise(&file, 0, 0, advice).unwrap();
    };
    let read_from_disk = || {
        let sum = || {
            let figures = fs::read_to_string("/proc/self/io").unwrap();
            let line = figures
                .lines()
                .find_map(|line| line.strip_prefix("read_bytes: "));
            line.unwrap().parse::<usize>().unwrap()
        };
        let before = sum();
        fs::read(&program).unwrap();
        sum() - before
    };
    forget();
    let whole = read_from_disk();
    if whole == 0 {
        skip("a file system in memory forgets nothing");
        return;
    }
    forget();
    bed.create("box", &bed.spec("true"), all_pipes())
        .await
        .unwrap();
    assert_eq!(read_from_disk(), 0, "of {whole}");
}

async fn nothing_runs_before_start() {
    let bed = Bed::new().await;
    bed.create("box", &bed.spec("touch /data/ran"), Stdio::default())
        .await
        .unwrap();
    assert!(!bed.rootfs().join("data/ran").exists());
    bed.start("box").await.unwrap();
    bed.wait("box").await.unwrap();
    assert!(bed.rootfs().join("data/ran").exists());
}

async fn a_created_container_ends_on_request() {
    let bed = Bed::new().await;
    for signal in [1u32, 2, 15] {
        bed.create("box", &bed.spec("true"), Stdio::default())
            .await
            .unwrap();
        bed.signal("box", signal, false).await.unwrap();
        assert_eq!(bed.wait("box").await.unwrap().exit_code, 128 + signal);
        bed.delete("box").await.unwrap();
    }
}

async fn start_needs_a_created_container() {
    let bed = Bed::new().await;
    bed.create("box", &bed.spec("sleep 1000"), Stdio::default())
        .await
        .unwrap();
    bed.start("box").await.unwrap();
    let (code, message) = bed.start("box").await.unwrap_err();
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert_eq!(message, "cannot start an already running container");
    bed.signal("box", 9, false).await.unwrap();
    bed.wait("box").await.unwrap();
    let (_, message) = bed.start("box").await.unwrap_err();
    assert_eq!(message, "cannot start a container that has stopped");
    bed.delete("box").await.unwrap();
    bed.create("box", &bed.spec("true"), Stdio::default())
        .await
        .unwrap();
    bed.signal("box", 9, false).await.unwrap();
    assert_eq!(bed.wait("box").await.unwrap().exit_code, 137);
    assert!(bed.start("box").await.is_err());
}

async fn signals_reach_the_process() {
    let bed = Bed::new().await;
    let spec = bed.spec("trap 'echo got it; exit 5' TERM; echo ready; while :; do sleep 0.1; done");
    bed.create("box", &spec, all_pipes()).await.unwrap();
    let mut stdout = bed.stream("box", StreamKind::STDOUT).await;
    let _stderr = bed.stream("box", StreamKind::STDERR).await;
    bed.start("box").await.unwrap();
    let mut ready = [0; 6];
    stdout.read_exact(&mut ready).await.unwrap();
    // Asks whether it is there, and changes nothing.
    for all in [false, true] {
        bed.signal("box", 0, all).await.unwrap();
    }
    for bad in [65, u32::MAX] {
        assert_eq!(
            bed.signal("box", bad, false).await.unwrap_err().0,
            Code::INVALID_ARGUMENT
        );
    }
    bed.signal("box", 15, true).await.unwrap();
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).await.unwrap();
    assert_eq!(rest, "got it\n");
    assert_eq!(bed.wait("box").await.unwrap().exit_code, 5);
    for signal in [0, 15] {
        let error = bed.signal("box", signal, false).await.unwrap_err();
        assert_eq!(error, (Code::NOT_FOUND, "container not running".to_owned()));
    }
    bed.signal("box", 9, true).await.unwrap();
}

async fn what_is_made_ahead_is_the_first_containers_alone() {
    let bed = Bed::ahead().await;
    assert_eq!(bed.cgroups(), 1);
    let mut networks = vec![fs::read_link("/proc/self/ns/net").unwrap()];
    let script = "readlink /proc/self/ns/net && grep -q 127.0.0.1 /proc/net/fib_trie";
    for id in ["one", "two"] {
        bed.running(id).await;
        let network = bed.exec_output(id, &bed.process(script)).await;
        networks.push(network.trim_end().into());
    }
    assert!(!bed.cgroup_of("one").exists());
    assert!(bed.cgroup_of("two").exists());
    networks.sort();
    networks.dedup();
    assert_eq!(networks.len(), 3, "{networks:?}");
    for id in ["one", "two"] {
        bed.signal(id, 9, false).await.unwrap();
        bed.wait(id).await.unwrap();
        bed.delete(id).await.unwrap();
    }
    assert_eq!(bed.cgroups(), 0);
}

async fn a_deleted_container_leaves_nothing() {
    let bed = Bed::new().await;
    let spec = bed.spec("setsid sleep 1000 & sleep 1000");
    let pid = bed.create("box", &spec, all_pipes()).await.unwrap();
    let mut stdout = bed.stream("box", StreamKind::STDOUT).await;
    bed.start("box").await.unwrap();
    assert!(bed.cgroup_of("box").exists());
    bed.delete("box").await.unwrap();
    assert!(!bed.cgroup_of("box").exists());
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    assert_eq!(stdout.read(&mut [0; 1]).await.unwrap_or(0), 0);
    assert_eq!(bed.delete("box").await.unwrap_err().0, Code::NOT_FOUND);
    bed.create("box", &bed.spec("true"), Stdio::default())
        .await
        .unwrap();
    bed.delete("box").await.unwrap();
}

async fn a_failed_creation_leaves_nothing() {
    let bed = Bed::new().await;
    let mut spec = bed.spec("");
    spec["process"]["args"] = json!(["nothing"]);
    bed.create("box", &spec, all_pipes()).await.unwrap_err();
    assert!(!bed.cgroup_of("box").exists());
    assert_eq!(bed.run(&bed.spec("true")).await.code, 0);
}

async fn an_unattached_output_waits_for_its_deletion_only() {
    let bed = Bed::new().await;
    bed.create("box", &bed.spec("echo hello"), all_pipes())
        .await
        .unwrap();
    bed.start("box").await.unwrap();
    let waiting = bed.wait("box");
    tokio::pin!(waiting);
    assert!(
        timeout(Duration::from_millis(200), &mut waiting)
            .await
            .is_err()
    );
    // What was written is still there for a late reader.
    let mut stdout = bed.stream("box", StreamKind::STDOUT).await;
    let mut output = String::new();
    stdout.read_to_string(&mut output).await.unwrap();
    assert_eq!(output, "hello\n");
    assert!(
        timeout(Duration::from_millis(200), &mut waiting)
            .await
            .is_err()
    );
    let (exit, deleted) = tokio::join!(waiting, bed.delete("box"));
    assert_eq!(exit.unwrap().exit_code, 0);
    deleted.unwrap();
}

async fn what_a_container_without_its_own_pids_leaves_is_killed() {
    let bed = Bed::new().await;
    let spec = without_pids(bed.spec("sleep 1000 & echo $! > /data/left; exit 3"));
    bed.create("box", &spec, Stdio::default()).await.unwrap();
    bed.start("box").await.unwrap();
    assert_eq!(bed.wait("box").await.unwrap().exit_code, 3);
    let left = fs::read_to_string(bed.rootfs().join("data/left")).unwrap();
    await_end(left.trim().parse().unwrap());
    bed.delete("box").await.unwrap();
}

async fn what_loses_its_parent_is_reaped() {
    let bed = Bed::new().await;
    nix::unistd::mkfifo(&bed.rootfs().join("data/gate"), Mode::S_IRWXU).unwrap();
    let mut gate = fs::File::options()
        .read(true)
        .write(true)
        .open(bed.rootfs().join("data/gate"))
        .unwrap();
    // Each reads one line, and by then its parent has ended.
    let script = "for one in 1 2 3; do (read line < /data/gate & echo $!); done";
    // Without pids of its own, a container has no other that they could go to.
    let spec = without_pids(bed.spec(&format!(
        "{script} > /data/left; echo ready; exec sleep 1000"
    )));
    bed.create("box", &spec, all_pipes()).await.unwrap();
    let mut stdout = bed.stream("box", StreamKind::STDOUT).await;
    let _stderr = bed.stream("box", StreamKind::STDERR).await;
    bed.start("box").await.unwrap();
    stdout.read_exact(&mut [0; 6]).await.unwrap();
    let mut left = bed.exec_output("box", &bed.process(script)).await;
    left += &fs::read_to_string(bed.rootfs().join("data/left")).unwrap();
    let left: Vec<u32> = left.lines().map(|pid| pid.parse().unwrap()).collect();
    assert_eq!(left.len(), 6);
    let agent = format!("PPid:\t{}\n", bed.agent.id());
    for pid in &left {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(status.contains(&agent), "{status}");
    }
    std::io::Write::write_all(&mut gate, &[b'\n'; 6]).unwrap();
    left.iter().copied().for_each(await_end);
    // The agent learns of the end of this one after that of all those.
    bed.exec_output("box", &bed.process("true")).await;
    for pid in left {
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "{pid}");
    }
}

/// The same, with the pids of the guest.
fn without_pids(mut spec: serde_json::Value) -> serde_json::Value {
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|namespace| namespace["type"] != "pid");
    spec
}

/// Waits until a process has ended, reaped or not.
fn await_end(pid: u32) {
    let Ok(process) = open_process(pid) else {
        return;
    };
    let mut ended = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    let limit = PollTimeout::try_from(PATIENCE).unwrap();
    assert_eq!(poll(&mut ended, limit), Ok(1), "{pid} has not ended");
}

async fn calls_before_hello_and_other_versions_are_refused() {
    let bed = Bed::ungreeted().await;
    assert_eq!(
        bed.wait("box").await.unwrap_err().0,
        Code::FAILED_PRECONDITION
    );
    let hello = HelloRequest {
        protocol_version: 99,
        host_version: "7.8.9".to_owned(),
        ..Default::default()
    };
    let error = bed
        .client
        .hello(Context::default(), &hello)
        .await
        .unwrap_err();
    let ttrpc::Error::RpcStatus(status) = error else {
        panic!("{error}")
    };
    assert_eq!(status.code(), Code::FAILED_PRECONDITION);
    assert!(
        status.message.contains("99") && status.message.contains("7.8.9"),
        "{}",
        status.message
    );
    assert_eq!(
        bed.wait("box").await.unwrap_err().0,
        Code::FAILED_PRECONDITION
    );
}

async fn ids_are_checked_and_taken_once() {
    let bed = Bed::new().await;
    let spec = bed.spec("true");
    for id in ["", "../x", "a/b"] {
        let (code, message) = bed.create(id, &spec, Stdio::default()).await.unwrap_err();
        assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
    }
    bed.create("box", &spec, Stdio::default()).await.unwrap();
    let error = bed
        .create("box", &spec, Stdio::default())
        .await
        .unwrap_err();
    assert_eq!(
        error,
        (
            Code::ALREADY_EXISTS,
            "container box already exists".to_owned()
        )
    );
    bed.delete("box").await.unwrap();
}

async fn unknown_containers_and_execs_are_not_found() {
    let bed = Bed::new().await;
    assert_eq!(
        bed.start("no").await.unwrap_err(),
        (Code::NOT_FOUND, "container no does not exist".to_owned())
    );
    assert_eq!(bed.wait("no").await.unwrap_err().0, Code::NOT_FOUND);
    assert_eq!(
        bed.signal("no", 9, true).await.unwrap_err().0,
        Code::NOT_FOUND
    );
    assert_eq!(bed.delete("no").await.unwrap_err().0, Code::NOT_FOUND);
    let mut stream = bed.stream("no", StreamKind::STDOUT).await;
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap_or(0), 0);
}

async fn a_terminal_is_a_terminal() {
    let bed = Bed::new().await;
    let stdio = Stdio {
        terminal: true,
        terminal_width: 100,
        terminal_height: 40,
        ..Default::default()
    };
    let mut spec = bed
        .spec("tty; stty size; test -c /dev/console && echo console; read line; echo \"<$line>\"");
    let (_, message) = bed.create("box", &spec, stdio.clone()).await.unwrap_err();
    assert_eq!(message, "process.terminal: the request's stdio says true");
    spec["process"]["terminal"] = json!(true);
    bed.create("box", &spec, stdio).await.unwrap();
    let mut terminal = bed.stream("box", StreamKind::TERMINAL).await;
    bed.start("box").await.unwrap();
    let shown = "/dev/pts/0\r\n40 100\r\nconsole\r\n";
    let mut output = vec![0; shown.len()];
    terminal.read_exact(&mut output).await.unwrap();
    assert_eq!(String::from_utf8(output).unwrap(), shown);
    terminal.write_all(b"typed\n").await.unwrap();
    let mut output = String::new();
    terminal.read_to_string(&mut output).await.unwrap();
    assert_eq!(output, "typed\r\n<typed>\r\n");
    assert_eq!(bed.wait("box").await.unwrap().exit_code, 0);
}

async fn the_end_of_the_control_connection_ends_everything() {
    let mut bed = Bed::new().await;
    let pid = bed
        .create("box", &bed.spec("sleep 1000"), Stdio::default())
        .await
        .unwrap();
    bed.start("box").await.unwrap();
    // Closes the connection, which the client holds to its end.
    let (control, _other) = tokio::net::UnixStream::pair().unwrap();
    let socket = ttrpc::r#async::transport::Socket::new(control);
    let client = ttrpc::r#async::Client::new(socket);
    drop(std::mem::replace(
        &mut bed.client,
        bulkhead_protocol::agent_ttrpc::AgentClient::new(client),
    ));
    let agent = bed.agent.id();
    tokio::task::spawn_blocking(move || {
        let pid = nix::unistd::Pid::from_raw(agent as i32);
        let gone = nix::sys::wait::Id::Pid(pid);
        let flags = nix::sys::wait::WaitPidFlag::WEXITED | nix::sys::wait::WaitPidFlag::WNOWAIT;
        nix::sys::wait::waitid(gone, flags)
    })
    .await
    .unwrap()
    .unwrap();
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    assert!(!bed.cgroup_of("box").exists());
}

async fn shutdown_ends_everything_with_an_answer() {
    let mut bed = Bed::new().await;
    let pid = bed
        .create("box", &bed.spec("sleep 1000"), Stdio::default())
        .await
        .unwrap();
    bed.start("box").await.unwrap();
    bed.client
        .shutdown(Context::default(), &ShutdownRequest::default())
        .await
        .unwrap();
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    assert!(bed.agent.wait().unwrap().success());
}

async fn a_hundred_life_cycles_leak_nothing() {
    let bed = Bed::new().await;
    let fds = format!("/proc/{}/fd", bed.agent.id());
    let count = || fs::read_dir(&fds).unwrap().count();
    bed.run(&bed.spec("echo x")).await;
    let before = count();
    for _ in 0..100 {
        assert_eq!(bed.run(&bed.spec("echo x")).await.stdout, "x\n");
    }
    assert_eq!(count(), before);
    bed.without_children().await;
    assert_eq!(bed.cgroups(), 0);
}

/// The shape and size of Docker's and Podman's default profile: some 400 calls allowed on three architectures, some
/// by their arguments, and an errno for the rest.
fn engine_profile() -> serde_json::Value {
    const REFUSED: &[&str] = &[
        "mount",
        "umount2",
        "ptrace",
        "kexec_load",
        "init_module",
        "delete_module",
        "finit_module",
        "bpf",
        "setns",
        "unshare",
        "swapon",
        "swapoff",
        "reboot",
        "settimeofday",
        "clock_settime",
        "personality",
        "clone",
        "clone3",
        "socket",
        "open_by_handle_at",
        "keyctl",
        "add_key",
        "request_key",
        "userfaultfd",
        "sethostname",
    ];
    let mut allowed: Vec<String> = (0..=450)
        .filter_map(|number| libseccomp::ScmpSyscall::from(number).get_name().ok())
        .filter(|name| !REFUSED.contains(&name.as_str()))
        .collect();
    // Calls of other architectures, and of none.
    allowed.extend(
        [
            "_llseek",
            "arm_fadvise64_64",
            "sync_file_range2",
            "no_such_call",
        ]
        .map(str::to_owned),
    );
    assert!(allowed.len() > 300, "{}", allowed.len());
    let personality = |value: u64| {
        json!({"names": ["personality"], "action": "SCMP_ACT_ALLOW",
               "args": [{"index": 0, "value": value, "op": "SCMP_CMP_EQ"}]})
    };
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 1,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            {"names": allowed, "action": "SCMP_ACT_ALLOW"},
            personality(0), personality(8), personality(0x20000), personality(0x20008), personality(0xffff_ffff),
            {"names": ["socket"], "action": "SCMP_ACT_ALLOW",
             "args": [{"index": 0, "value": 40, "op": "SCMP_CMP_NE"}]},
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW",
             "args": [{"index": 0, "value": 0x7e02_0000, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]},
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}
        ]
    })
}

async fn a_profile_as_large_as_the_engines_default_lets_programs_run_and_refuses_the_rest() {
    let bed = Bed::new().await;
    let mut spec = bed.spec(
        "grep -E 'Seccomp:' /proc/self/status; ls / | head -n 1; sleep 0; (echo forked); \
         mount -t tmpfs x /tmp 2>&1; hostname other 2>&1; true",
    );
    spec["linux"]["seccomp"] = engine_profile();
    for set in ["bounding", "effective", "permitted"] {
        spec["process"]["capabilities"][set] = json!(["CAP_SYS_ADMIN"]);
    }
    assert_eq!(
        bed.output(&spec).await,
        "Seccomp:\t2\nbin\nforked\nmount: permission denied (are you root?)\n\
         hostname: sethostname: Operation not permitted\n"
    );
}

async fn a_profile_holds_with_and_without_new_privileges() {
    let bed = Bed::new().await;
    let mut spec =
        bed.spec("grep -E 'NoNewPrivs|Seccomp:' /proc/self/status; mkdir /tmp/x 2>&1; true");
    spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]
    });
    for (no_new_privileges, user) in [(true, 0), (false, 0), (true, 1000), (false, 1000)] {
        spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
        spec["process"]["user"] = json!({"uid": user, "gid": user});
        assert_eq!(
            bed.output(&spec).await,
            format!(
                "NoNewPrivs:\t{}\nSeccomp:\t2\nmkdir: can't create directory '/tmp/x': No space left on device\n",
                u8::from(no_new_privileges)
            )
        );
    }
}

async fn a_profile_that_knows_newer_calls_but_no_faccessat2_lets_programs_run() {
    let bed = Bed::new().await;
    let mut spec = bed.spec("echo ran");
    spec["linux"]["seccomp"] = engine_profile();
    spec["linux"]["seccomp"]["syscalls"][0]["names"]
        .as_array_mut()
        .unwrap()
        .retain(|name| name != "faccessat2");
    assert_eq!(bed.output(&spec).await, "ran\n");
}

async fn a_profile_that_forbids_the_exec_is_said_at_start() {
    let bed = Bed::new().await;
    let mut spec = bed.spec("true");
    spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["execve"], "action": "SCMP_ACT_ERRNO"}]
    });
    bed.create("box", &spec, Stdio::default()).await.unwrap();
    let (code, message) = bed.start("box").await.unwrap_err();
    assert_eq!(
        (code, message.as_str()),
        (
            Code::PERMISSION_DENIED,
            "exec /bin/sh: operation not permitted"
        )
    );
    bed.delete("box").await.unwrap();
    spec["linux"]["seccomp"]["syscalls"][0]["action"] = json!("SCMP_ACT_KILL_PROCESS");
    bed.create("box", &spec, Stdio::default()).await.unwrap();
    bed.start("box").await.unwrap();
    assert_eq!(bed.wait("box").await.unwrap().exit_code, 128 + 31);
}

/// With a user namespace that maps 0..65536 to 100000 and up, and a root filesystem that belongs to it.
pub fn in_user_namespace(bed: &Bed, script: &str) -> serde_json::Value {
    fn give(path: &Path) {
        std::os::unix::fs::lchown(path, Some(100_000), Some(100_000)).unwrap();
        if path.is_dir() && !path.is_symlink() {
            for entry in fs::read_dir(path).unwrap() {
                give(&entry.unwrap().path());
            }
        }
    }
    give(&bed.rootfs());
    let mut spec = bed.spec(script);
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    spec["linux"]["uidMappings"] = map.clone();
    spec["linux"]["gidMappings"] = map;
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.push(json!({"type": "user"}));
    spec
}

async fn a_user_namespace_maps_the_users_and_owns_everything() {
    let bed = Bed::new().await;
    // The test's own folder is closed to others.
    let script = "cat /proc/self/uid_map | tr -s ' '; id -u; touch /data/mine; stat -c '%u:%g %n' /data /dev/pts /dev/shm; \
                  stat -c '%t:%T %n' /dev/null /dev/fifo; echo x > /dev/null; echo out > /dev/stdout; cat /proc/self/oom_score_adj; \
                  ulimit -Hn; mount -t tmpfs x /tmp && echo mounted; hostname; \
                  hostname renamed && hostname; readlink /proc/self/fd/0";
    let mut spec = in_user_namespace(&bed, script);
    spec["process"]["oomScoreAdj"] = json!(500);
    spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "hard": 9_000, "soft": 9_000}]);
    spec["linux"]["devices"] = json!([{"path": "/dev/fifo", "type": "p"}]);
    for set in ["bounding", "effective", "permitted"] {
        spec["process"]["capabilities"][set] = json!(["CAP_SYS_ADMIN"]);
    }
    let pid = bed.create("box", &spec, all_pipes()).await.unwrap();
    let user = fs::read_link(format!("/proc/{pid}/ns/user")).unwrap();
    assert_ne!(user, fs::read_link("/proc/self/ns/user").unwrap());
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains("Uid:\t100000\t100000"), "{status}");
    bed.delete("box").await.unwrap();
    let output = bed.output(&spec).await;
    assert!(
        output.starts_with(" 0 100000 65536\n0\n0:0 /data\n"),
        "{output}"
    );
    assert!(
        output.contains(
            "1:3 /dev/null\n0:0 /dev/fifo\nout\n500\n9000\nmounted\nbox\nrenamed\npipe:["
        ),
        "{output}"
    );
    let owner = fs::metadata(bed.rootfs().join("data/mine")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&owner), 100_000);
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [7]});
    spec["process"]["args"] = json!(["/bin/sh", "-c", "id -u; id -G; echo x > /dev/stderr"]);
    let outcome = bed.run(&spec).await;
    assert_eq!(
        (outcome.stdout.as_str(), outcome.stderr.as_str()),
        ("1000\n1000 7\n", "x\n")
    );
}

async fn a_user_namespace_binds_what_others_may_not_reach() {
    let bed = Bed::new().await;
    let closed = bed.dir().join("closed");
    fs::create_dir_all(closed.join("volume")).unwrap();
    fs::write(closed.join("volume/file"), "text\n").unwrap();
    std::os::unix::fs::chown(&closed, Some(12), Some(12)).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).unwrap();
    let mut spec = in_user_namespace(
        &bed,
        "cat /new/volume/file /one; touch /new/volume/x 2>&1; true",
    );
    for mount in [
        json!({"destination": "/new/volume", "type": "bind", "source": closed.join("volume"), "options": ["bind", "ro"]}),
        json!({"destination": "/one", "type": "bind", "source": closed.join("volume/file"), "options": ["bind"]}),
    ] {
        spec["mounts"].as_array_mut().unwrap().push(mount);
    }
    assert_eq!(
        bed.output(&spec).await,
        "text\ntext\ntouch: /new/volume/x: Read-only file system\n"
    );
}

async fn the_cgroup_of_a_user_namespace_belongs_to_its_root() {
    let bed = Bed::new().await;
    let script = "cd /sys/fs/cgroup; stat -c '%u %n' . cgroup.procs memory.max; mkdir mine && echo made; echo 1 > mine/cgroup.procs && cat /proc/self/cgroup";
    let mut spec = in_user_namespace(&bed, script);
    spec["mounts"][6]["options"] = json!(["nosuid", "noexec", "nodev"]);
    let output = bed.run(&spec).await.stdout;
    assert!(output.starts_with("0 .\n0 cgroup.procs\n"), "{output}");
    assert!(
        output.contains("made\n") && output.ends_with("0::/mine\n"),
        "{output}"
    );
    // Read-only, it stays the guest's.
    let mut spec = in_user_namespace(
        &bed,
        "stat -c %u /sys/fs/cgroup; mkdir /sys/fs/cgroup/mine 2>&1; true",
    );
    spec["hostname"] = json!("box");
    assert_eq!(
        bed.output(&spec).await,
        "65534\nmkdir: can't create directory '/sys/fs/cgroup/mine': Read-only file system\n"
    );
}

async fn a_user_namespace_without_a_cgroup_namespace_sees_the_cgroups() {
    let bed = Bed::new().await;
    // Its own, with its only process, is where the hierarchy says it is.
    let script = "path=$(grep ^0:: /proc/self/cgroup); path=${path#0::}; echo $path; \
                  read pid < /sys/fs/cgroup$path/cgroup.procs; echo $pid; touch /sys/fs/cgroup/x 2>&1; true";
    let mut spec = in_user_namespace(&bed, script);
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|namespace| namespace["type"] != "cgroup");
    let output = bed.output(&spec).await;
    let (path, rest) = output.split_once('\n').unwrap();
    assert!(
        bed.cgroup_of("box").ends_with(&path[1..]) && path.len() > 1,
        "{output}"
    );
    assert_eq!(rest, "1\ntouch: /sys/fs/cgroup/x: Read-only file system\n");
}

async fn maps_that_the_kernel_refuses_are_named() {
    let bed = Bed::new().await;
    let mut spec = in_user_namespace(&bed, "true");
    let twice = json!([
        {"containerID": 0, "hostID": 100_000, "size": 10},
        {"containerID": 5, "hostID": 200_000, "size": 10}
    ]);
    spec["linux"]["uidMappings"] = twice;
    let (code, message) = bed
        .create("box", &spec, Stdio::default())
        .await
        .unwrap_err();
    assert_eq!(
        (code, message.as_str()),
        (
            Code::INVALID_ARGUMENT,
            "linux.uidMappings: invalid argument"
        )
    );
    let mut spec = in_user_namespace(&bed, "true");
    spec["process"]["user"]["uid"] = json!(70000);
    let (_, message) = bed
        .create("box", &spec, Stdio::default())
        .await
        .unwrap_err();
    assert_eq!(
        message,
        "process.user.uid: cannot set uid to unmapped user in user namespace"
    );
    assert!(!bed.cgroup_of("box").exists());
}

async fn the_clocks_have_their_offsets() {
    let bed = Bed::new().await;
    for user in [false, true] {
        let script = "cat /proc/self/timens_offsets | tr -s ' '; cat /proc/uptime";
        let mut spec = if user {
            in_user_namespace(&bed, script)
        } else {
            bed.spec(script)
        };
        let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.push(json!({"type": "time"}));
        spec["linux"]["timeOffsets"] = json!({
            "monotonic": {"secs": 172_800, "nanosecs": 5},
            "boottime": {"secs": 8_640_000}
        });
        let output = bed.output(&spec).await;
        assert!(
            output.starts_with("monotonic 172800 5\nboottime 8640000 0\n"),
            "{output}"
        );
        let uptime = output.lines().last().unwrap().split('.').next().unwrap();
        assert!(uptime.parse::<u64>().unwrap() > 8_640_000, "{output}");
    }
    let mut spec = bed.spec("true");
    spec["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1}});
    let (_, message) = bed
        .create("box", &spec, Stdio::default())
        .await
        .unwrap_err();
    assert!(
        message.starts_with("linux.timeOffsets: needs a new time namespace"),
        "{message}"
    );
}

async fn a_remount_changes_what_is_mounted() {
    let bed = Bed::new().await;
    let mut spec = bed.spec(
        "touch /dev/shm/x 2>&1; touch /data/in 2>&1; grep -E ' /(data|tmp) ' /proc/self/mounts",
    );
    let source = bed.dir().join("source");
    fs::create_dir(&source).unwrap();
    for mount in [
        json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["remount", "ro"]}),
        json!({"destination": "/data", "type": "bind", "source": source, "options": ["bind", "nosuid"]}),
        json!({"destination": "/data", "type": "bind", "source": source, "options": ["bind", "remount", "ro", "noexec"]}),
        json!({"destination": "/tmp", "type": "tmpfs", "source": "tmp", "options": ["size=64k"]}),
        json!({"destination": "/tmp", "type": "tmpfs", "source": "tmp", "options": ["remount", "size=128k", "nodev"]}),
    ] {
        spec["mounts"].as_array_mut().unwrap().push(mount);
    }
    let output = bed.output(&spec).await;
    assert_eq!(
        output.matches("Read-only file system").count(),
        2,
        "{output}"
    );
    let data = output
        .lines()
        .find(|line| line.contains(" /data "))
        .unwrap();
    assert!(
        data.contains(" ro,") && data.contains("noexec") && !data.contains("nosuid"),
        "{data}"
    );
    let tmp = output.lines().find(|line| line.contains(" /tmp ")).unwrap();
    assert!(tmp.contains("size=128k") && tmp.contains("nodev"), "{tmp}");
    let mount = json!({"destination": "/etc", "type": "tmpfs", "options": ["remount"]});
    spec["mounts"].as_array_mut().unwrap().push(mount);
    let (_, message) = bed
        .create("box", &spec, Stdio::default())
        .await
        .unwrap_err();
    assert_eq!(
        message,
        "mounts[12] (/etc): cannot remount: invalid argument"
    );
}

async fn a_remount_does_not_reach_the_guests_file_systems() {
    let bed = Bed::new().await;
    let source = bed.dir().join("source");
    fs::create_dir(&source).unwrap();
    symlink("/volume", bed.rootfs().join("data/link")).unwrap();
    let mut spec = bed.spec("touch /volume/x 2>&1; touch /data/still 2>&1");
    for mount in [
        json!({"destination": "/volume", "type": "bind", "source": source, "options": ["bind"]}),
        json!({"destination": "/data/link", "type": "tmpfs", "options": ["remount", "ro"]}),
        json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "options": ["remount", "ro"]}),
    ] {
        spec["mounts"].as_array_mut().unwrap().push(mount);
    }
    assert_eq!(
        bed.output(&spec).await,
        "touch: /volume/x: Read-only file system\n"
    );
    fs::write(source.join("outside"), "").unwrap();
    // The agent can still make cgroups.
    assert_eq!(bed.run(&bed.spec("true")).await.code, 0);
}

async fn a_tmpfs_begins_with_what_it_covers() {
    let bed = Bed::new().await;
    fs::create_dir(bed.rootfs().join("data/below")).unwrap();
    fs::write(bed.rootfs().join("data/below/file"), "text\n").unwrap();
    symlink("/etc/shadow", bed.rootfs().join("data/link")).unwrap();
    fs::set_permissions(bed.rootfs().join("data"), fs::Permissions::from_mode(0o711)).unwrap();
    let mut spec =
        bed.spec("cat /data/below/file; readlink /data/link; stat -c %a /data; touch /data/x");
    let mount = json!({"destination": "/data", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup"]});
    spec["mounts"].as_array_mut().unwrap().push(mount);
    assert_eq!(bed.output(&spec).await, "text\n/etc/shadow\n711\n");
    assert!(!bed.rootfs().join("data/x").exists());
}

async fn a_read_only_tmpfs_holds_places_for_mounts() {
    let bed = Bed::new().await;
    let mut spec = bed.spec("ls /data; touch /data/deep/x && touch /data/x 2>&1; true");
    for (destination, options) in [("/data", json!(["ro"])), ("/data/deep", json!([]))] {
        let mount = json!({"destination": destination, "type": "tmpfs", "source": "tmpfs", "options": options});
        spec["mounts"].as_array_mut().unwrap().push(mount);
    }
    assert_eq!(
        bed.output(&spec).await,
        "deep\ntouch: /data/x: Read-only file system\n"
    );
}

async fn nothing_but_procfs_is_mounted_over_proc() {
    let bed = Bed::new().await;
    let file = bed.dir().join("file");
    fs::write(&file, "0 0\n").unwrap();
    symlink("/proc/self", bed.rootfs().join("data/link")).unwrap();
    for (destination, refused) in [
        ("/proc/uptime", None),
        (
            "/proc/sys/kernel/hostname",
            Some("\"/proc/sys/kernel/hostname\" cannot be mounted because it is inside /proc"),
        ),
        (
            "/data/../proc/version",
            Some("\"/proc/version\" cannot be mounted because it is inside /proc"),
        ),
        (
            "/proc",
            Some("\"/proc\" cannot be mounted because it is not of type proc"),
        ),
    ] {
        let mut spec = bed.spec("cat /proc/uptime");
        let mount = json!({"destination": destination, "type": "bind", "source": file, "options": ["bind"]});
        spec["mounts"].as_array_mut().unwrap().push(mount);
        match refused {
            None => assert_eq!(bed.output(&spec).await, "0 0\n"),
            Some(words) => {
                let (_, message) = bed
                    .create("box", &spec, Stdio::default())
                    .await
                    .unwrap_err();
                assert!(message.contains(words), "{message}");
            }
        }
    }
    let mut spec = bed.spec("true");
    let mount = json!({"destination": "/proc", "type": "tmpfs", "source": "tmpfs"});
    spec["mounts"].as_array_mut().unwrap().push(mount);
    let (_, message) = bed
        .create("box", &spec, Stdio::default())
        .await
        .unwrap_err();
    assert_eq!(
        message,
        "mounts[7] (/proc): \"/proc\" cannot be mounted because it is not of type proc"
    );
}

async fn ids_of_a_bind_mount_are_mapped() {
    let bed = Bed::new().await;
    let source = bed.dir().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "").unwrap();
    let map = json!([{"containerID": 0, "hostID": 5000, "size": 1000}]);
    let mut spec =
        bed.spec("stat -c '%u %g' /mapped/file; touch /mapped/new && stat -c %u /mapped/new");
    spec["process"]["user"] = json!({"uid": 5000, "gid": 5000});
    let mount = json!({
        "destination": "/mapped", "type": "bind", "source": source, "options": ["rbind", "ridmap"],
        "uidMappings": map, "gidMappings": map
    });
    spec["mounts"].as_array_mut().unwrap().push(mount);
    if let Err((code, message)) = bed.create("box", &spec, Stdio::default()).await {
        assert_eq!(code, Code::INVALID_ARGUMENT);
        assert!(
            message.contains("can't map ids in the guest's kernel"),
            "{message}"
        );
        skip("id-mapped mounts, which the tests' file system has not on this kernel");
        return;
    }
    bed.delete("box").await.unwrap();
    assert_eq!(bed.output(&spec).await, "5000 5000\n5000\n");
    let made = fs::metadata(source.join("new")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&made), 0);
    // By the maps of the container's own user namespace.
    let mut spec = in_user_namespace(&bed, "stat -c '%u %g' /mapped/file");
    let mount = json!({"destination": "/mapped", "type": "bind", "source": source, "options": ["bind", "idmap"]});
    spec["mounts"].as_array_mut().unwrap().push(mount);
    assert_eq!(bed.output(&spec).await, "0 0\n");
    // procfs can't.
    spec["mounts"][7]["source"] = json!("/proc/sys");
    let (code, message) = bed
        .create("box", &spec, Stdio::default())
        .await
        .unwrap_err();
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(
        message.contains("can't map ids in the guest's kernel"),
        "{message}"
    );
}

async fn masks_follow_links_inside_the_root_only() {
    let bed = Bed::new().await;
    let outside = bed.dir().join("outside");
    fs::write(&outside, "outside").unwrap();
    fs::write(bed.rootfs().join("secret"), "secret").unwrap();
    symlink("../../../secret", bed.rootfs().join("data/link")).unwrap();
    symlink(&outside, bed.rootfs().join("data/out")).unwrap();
    symlink("/proc/self/exe", bed.rootfs().join("data/magic")).unwrap();
    let mut spec = bed.spec("cat /secret; cat /data/link");
    spec["linux"]["maskedPaths"] = json!(["/data/link", "/data/out"]);
    assert_eq!(bed.run(&spec).await.stdout, "");
    assert_eq!(fs::read_to_string(&outside).unwrap(), "outside");
    for field in ["maskedPaths", "readonlyPaths"] {
        let mut spec = bed.spec("true");
        spec["linux"][field] = json!(["/data/magic"]);
        let (_, message) = bed
            .create("box", &spec, Stdio::default())
            .await
            .unwrap_err();
        assert!(
            message.starts_with(&format!("linux.{field} (/data/magic): ")),
            "{message}"
        );
    }
}

async fn sysfs_mounts_without_a_network_namespace() {
    let bed = Bed::new().await;
    let mut spec = bed.spec("ls -d /sys/class/net/lo; grep -c ' /sys sysfs ro' /proc/self/mounts");
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|namespace| namespace["type"] != "network");
    assert_eq!(bed.output(&spec).await, "/sys/class/net/lo\n1\n");
}

async fn limits_are_set_before_anything_runs() {
    let bed = Bed::new().await;
    let mut spec = bed.spec("cat /sys/fs/cgroup/cgroup.max.depth");
    // A file that every cgroup has, whatever controllers this machine's v2 hierarchy got.
    spec["linux"]["resources"] = json!({"unified": {"cgroup.max.depth": "5"}});
    bed.create("box", &spec, Stdio::default()).await.unwrap();
    let depth = bed.cgroup_of("box").join("cgroup.max.depth");
    assert_eq!(fs::read_to_string(depth).unwrap(), "5\n");
    bed.delete("box").await.unwrap();
    assert_eq!(bed.output(&spec).await, "5\n");
    spec["linux"]["resources"] = json!({"unified": {"nosuch.max": "5"}});
    let (code, message) = bed
        .create("box", &spec, Stdio::default())
        .await
        .unwrap_err();
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert_eq!(
        message,
        "linux.resources.unified[\"nosuch.max\"]: cannot set nosuch.max to \"5\": the guest's kernel has no such limit"
    );
    assert!(!bed.cgroup_of("box").exists());
}

async fn start_hooks_run_in_the_container_right_before_the_program() {
    let bed = Bed::new().await;
    let mut spec = bed.spec("cat /data/state /data/log; echo program");
    spec["annotations"] = json!({"color": "red"});
    spec["hooks"] = json!({"startContainer": [
        {"path": "/bin/sh", "args": ["sh", "-c", "cat > /data/state; env | sort > /data/log; id -u >> /data/log"],
         "env": ["A=1", "PATH=/bin"], "timeout": 30},
        {"path": "/bin/sh", "args": ["sh", "-c", "echo second $TERM >> /data/log; echo ignored"]}
    ]});
    bed.create("box", &spec, all_pipes()).await.unwrap();
    assert!(!bed.rootfs().join("data/state").exists());
    bed.delete("box").await.unwrap();
    let output = bed.output(&spec).await;
    // PWD and SHLVL are the shell's own.
    assert!(
        output.ends_with("}A=1\nPATH=/bin\nPWD=/\nSHLVL=1\n0\nsecond xterm\nprogram\n"),
        "{output}"
    );
    let state = fs::read_to_string(bed.rootfs().join("data/state")).unwrap();
    let state: serde_json::Value = serde_json::from_str(&state).unwrap();
    assert_eq!(
        state,
        json!({"ociVersion": "1.0.2-dev", "id": "box", "status": "created", "pid": 1, "bundle": bed.dir(),
               "annotations": {"color": "red"}})
    );
}

async fn a_start_hook_that_fails_ends_the_start() {
    let bed = Bed::new().await;
    for (hook, expected) in [
        (
            json!({"path": "/bin/sh", "args": ["sh", "-c", "echo told; echo why >&2; exit 3"]}),
            "hooks.startContainer[1]: error running hook: exit status 3, stdout: told, stderr: why",
        ),
        (
            json!({"path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1}),
            "hooks.startContainer[1]: hook ran past specified timeout of 1.0s",
        ),
        (
            json!({"path": "/no/such"}),
            "hooks.startContainer[1]: error running hook: no such file or directory",
        ),
        (
            json!({"path": "/bin/sh", "args": ["sh", "-c", "kill -9 $$"]}),
            "hooks.startContainer[1]: error running hook: signal 9, stdout: , stderr: ",
        ),
    ] {
        let mut spec = bed.spec("touch /data/ran");
        spec["hooks"] = json!({"startContainer": [{"path": "/bin/true"}, hook]});
        bed.create("box", &spec, Stdio::default()).await.unwrap();
        let (_, message) = bed.start("box").await.unwrap_err();
        assert_eq!(message, expected);
        assert_eq!(bed.wait("box").await.unwrap().exit_code, 1);
        bed.delete("box").await.unwrap();
    }
    assert!(!bed.rootfs().join("data/ran").exists());
}

async fn the_scheduler_is_the_specs() {
    let bed = Bed::new().await;
    // Counted from the state, which is the third field (proc_pid_stat(5)).
    let fields = |stat: &str| -> [String; 2] {
        let fields: Vec<_> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        [fields[41 - 3], fields[19 - 3]].map(str::to_owned)
    };
    let [_, own_nice] = fields(&fs::read_to_string("/proc/self/stat").unwrap());
    let mut spec = bed.spec("exec cat /proc/self/stat");
    for (scheduler, policy, nice) in [
        (
            json!({"policy": "SCHED_BATCH", "nice": 7, "flags": ["SCHED_FLAG_RESET_ON_FORK"]}),
            "3",
            "7",
        ),
        (json!({"policy": "SCHED_IDLE"}), "5", own_nice.as_str()),
        (json!({"policy": "SCHED_OTHER", "nice": 19}), "0", "19"),
    ] {
        spec["process"]["scheduler"] = scheduler;
        let stat = bed.output(&spec).await;
        assert_eq!(fields(&stat), [policy, nice], "{stat}");
    }
    spec["process"]["scheduler"] = json!({"policy": "SCHED_ISO"});
    let (_, message) = bed
        .create("box", &spec, Stdio::default())
        .await
        .unwrap_err();
    assert_eq!(message, "process.scheduler: invalid argument");
}

async fn a_terminal_of_unknown_size_has_the_specs() {
    let bed = Bed::new().await;
    let mut spec = bed.spec("stty size");
    spec["process"]["terminal"] = json!(true);
    spec["process"]["consoleSize"] = json!({"width": 90, "height": 30});
    for (width, expected) in [(0, "30 90\r\n"), (70, "70 70\r\n")] {
        let stdio = Stdio {
            terminal: true,
            terminal_width: width,
            terminal_height: width,
            ..Default::default()
        };
        bed.create("box", &spec, stdio).await.unwrap();
        let mut terminal = bed.stream("box", StreamKind::TERMINAL).await;
        bed.start("box").await.unwrap();
        let mut output = String::new();
        terminal.read_to_string(&mut output).await.unwrap();
        assert_eq!(output, expected);
        bed.delete("box").await.unwrap();
    }
}

async fn processes_join_a_container_of_every_kind_of_namespace() {
    let bed = Bed::new().await;
    let mut spec = in_user_namespace(&bed, "sleep 1000");
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.push(json!({"type": "time"}));
    spec["linux"]["timeOffsets"] = json!({"boottime": {"secs": 8_640_000}});
    spec["linux"]["seccomp"] = engine_profile();
    spec["root"]["readonly"] = json!(true);
    spec["process"]["terminal"] = json!(true);
    let stdio = Stdio {
        terminal: true,
        ..Default::default()
    };
    let pid = bed.create("box", &spec, stdio).await.unwrap();
    let script = "readlink /proc/self/ns/time; readlink /proc/self/ns/user; id -u; touch /x 2>&1; \
                  grep Seccomp: /proc/self/status; cat /proc/uptime; stat -c '%u %t' /dev/console";
    for state in ["created", "running"] {
        if state == "running" {
            bed.start("box").await.unwrap();
        }
        let output = bed.exec_output("box", &bed.process(script)).await;
        let lines: Vec<_> = output.lines().collect();
        for (line, kind) in lines.iter().zip(["time", "user"]) {
            let init = fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
            assert_eq!(init.to_str(), Some(*line), "{state}");
            let agent = fs::read_link(format!("/proc/{}/ns/{kind}", bed.agent.id())).unwrap();
            assert_ne!(init, agent, "{state}");
        }
        assert_eq!(
            &lines[2..5],
            ["0", "touch: /x: Read-only file system", "Seccomp:\t2"],
            "{state}: {output}"
        );
        let uptime = lines[5].split('.').next().unwrap();
        assert!(
            uptime.parse::<u64>().unwrap() > 8_640_000,
            "{state}: {output}"
        );
        assert_eq!(lines[6], "0 88", "{state}: {output}");
    }
}

async fn the_kernel_is_told_to_forget_files_and_no_child_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let told = dir.path().join("told");
    fs::write(&told, "").unwrap();
    for (file, expected) in [
        (told.as_path(), Ok(())),
        (
            Path::new("/dev/full"),
            Err("cannot forget files that are not used: no space left on device"),
        ),
    ] {
        let bed = Bed::forgetting_by(file).await;
        let request = ForgetFilesRequest::default();
        let answer = bed.client.forget_files(Context::default(), &request).await;
        let agent = bed.agent.id();
        let children = fs::read_to_string(format!("/proc/{agent}/task/{agent}/children"));
        assert_eq!(children.unwrap(), "");
        match expected {
            Ok(()) => assert!(answer.is_ok(), "{answer:?}"),
            Err(message) => {
                let error = answer.unwrap_err().to_string();
                assert!(error.contains(message), "{error}");
            }
        }
    }
    assert_eq!(fs::read_to_string(told).unwrap(), "2");
}

async fn while_the_kernel_forgets_files_the_agent_serves_and_what_it_closes_is_closed() {
    let dir = tempfile::tempdir().unwrap();
    // Nobody gets beyond its opening as long as nobody reads.
    let kernel = dir.path().join("kernel");
    nix::unistd::mkfifo(&kernel, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    let bed = Bed::forgetting_by(&kernel).await;
    bed.create("box", &bed.spec("cat"), all_pipes())
        .await
        .unwrap();
    let mut streams = Vec::new();
    for kind in [StreamKind::STDIN, StreamKind::STDOUT, StreamKind::STDERR] {
        streams.push(bed.stream("box", kind).await);
    }
    bed.start("box").await.unwrap();

    let client = bed.client.clone();
    let forgetting = tokio::spawn(async move {
        let request = ForgetFilesRequest::default();
        client.forget_files(Context::default(), &request).await
    });
    let agent = bed.agent.id();
    let children = || {
        let children = fs::read_to_string(format!("/proc/{agent}/task/{agent}/children"));
        children.unwrap().split_whitespace().count()
    };
    while children() < 2 {
        tokio::task::yield_now().await;
    }
    streams[0].shutdown().await.unwrap();
    assert_eq!(bed.wait("box").await.unwrap().exit_code, 0);
    assert!(!forgetting.is_finished());
    let told = tokio::task::spawn_blocking(|| fs::read_to_string(kernel));
    let told = told.await.unwrap().unwrap();
    assert_eq!(told, "2");
    forgetting.await.unwrap().unwrap();
}
