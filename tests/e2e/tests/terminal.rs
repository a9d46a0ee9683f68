//! Terminals: over a console socket, as conmon and containerd's shim take them, and in the foreground.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use bulkhead_e2e::bundle::Bundle;
use bulkhead_e2e::command::{bulkhead, finish, run_command, runc};
use bulkhead_e2e::console::{Console, ConsoleSocket};
use bulkhead_e2e::container::{Container, reap_all, wait_for};
use bulkhead_e2e::leaks::Host;
use bulkhead_e2e::{processes, watch};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::unistd::{Pid, mkfifo, setsid};
use serde_json::json;

fn with_terminal(args: &[&str]) -> Bundle {
    let mut bundle = Bundle::busybox(args);
    bundle.config["process"]["terminal"] = json!(true);
    bundle
}

/// A created container with a terminal that the test holds.
fn create(bundle: &Bundle) -> (Container<'_>, Console) {
    let socket = ConsoleSocket::new();
    let flags = ["--console-socket", socket.path().to_str().unwrap()].map(str::to_owned);
    let container = Container::create_with(bulkhead(), bundle, &[&flags[0], &flags[1]]);
    let console = socket.receive();
    (container, console)
}

/// Asks for the size until the process at the terminal has learned of the new one.
#[track_caller]
fn expect_size(console: &mut Console, size: &str) {
    const TRIES: usize = 50;
    let learned = (0..TRIES).any(|_| {
        console.type_in("stty size; echo si''zed\n");
        console.expect("sized").contains(size)
    });
    assert!(learned, "the size is not {size}");
}

/// What a user does at a shell whose terminal is a real one. (Quotes within words keep the echo of what is typed apart from what it prints.)
#[track_caller]
fn use_shell(console: &mut Console) {
    console.type_in("tty; [ -t 0 -a -t 1 -a -t 2 ] && echo all th''ree\n");
    let shown = console.expect("all three");
    assert!(
        shown.contains("/dev/pts/0") || shown.contains("/dev/console"),
        "{shown}"
    );
    console.resize(97, 41);
    expect_size(console, "41 97");
    // Ctrl-C ends the job and not the shell.
    console.type_in("sh -c 'echo run\"\"ning; exec sleep 1000'\n");
    console.expect("running");
    console.type_in("\x03");
    console.type_in("echo st''ill here\n");
    console.expect("still here");
    // Ctrl-Z stops one, and the shell has the terminal; `fg` gives it back, which its answer shows, and Ctrl-C is for it again.
    console.type_in("tr a-z A-Z\n");
    console.type_in("before\n");
    console.expect("BEFORE");
    console.type_in("\x1a");
    console.expect("Stopped");
    console.type_in("fg\n");
    console.type_in("behind\n");
    console.expect("BEHIND");
    console.type_in("\x03");
    // A job that reads may take what is typed before it has ended.
    console.expect("# ");
    console.type_in("echo back ag''ain\n");
    console.expect("back again");
    // Ctrl-D is the end of the input.
    console.type_in("echo go''ing; cat; echo af''ter\n");
    console.expect("going");
    console.type_in("\x04");
    console.expect("after");
}

#[test]
fn a_terminal_over_a_console_socket_is_a_real_one() {
    let _unchanged = Host::unchanged();
    let bundle = with_terminal(&["sh"]);
    let (container, mut console) = create(&bundle);
    container.command(&["start"]).expect_code(0);
    use_shell(&mut console);
    container.command_with(&["kill"], &["KILL"]).expect_code(0);
    console.rest();
    assert_eq!(container.wait(), 137);
}

#[test]
fn a_terminal_in_the_foreground_is_a_real_one() {
    let _unchanged = Host::unchanged();
    let bundle = with_terminal(&["sh"]);
    let (mut console, terminal) = Console::open(80, 24);
    let mut command = run_command(Command::new(bulkhead()), &bundle);
    let mut child = Console::start(&terminal, &mut command);
    use_shell(&mut console);
    console.type_in("exit 7\n");
    assert_eq!(child.wait().unwrap().code(), Some(7));
}

#[test]
fn a_process_executed_in_the_foreground_gets_a_real_terminal() {
    let _unchanged = Host::unchanged();
    let container = Container::running(bulkhead(), Bundle::idle());
    let (mut console, terminal) = Console::open(80, 24);
    let before = tcgetattr(&terminal).unwrap();
    let mut command = container.prepare(&["exec", "-t"], &["sh"]);
    let mut child = Console::start(&terminal, &mut command);
    use_shell(&mut console);
    console.type_in("exit 7\n");
    assert_eq!(child.wait().unwrap().code(), Some(7));
    assert!(tcgetattr(&terminal).unwrap() == before, "not restored");
}

#[test]
fn an_executed_process_gets_a_terminal_of_its_own() {
    let _unchanged = Host::unchanged();
    let container = Container::running(bulkhead(), Bundle::idle());
    let socket = ConsoleSocket::new();
    let pid_file = container.files().join("exec-pid");
    let before = [
        "exec",
        "--detach",
        "--tty",
        "--console-socket",
        socket.path().to_str().unwrap(),
        "--pid-file",
        pid_file.to_str().unwrap(),
    ]
    .map(str::to_owned);
    let before: Vec<&str> = before.iter().map(String::as_str).collect();
    let status = container
        .prepare(&before, &["sh"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    assert!(status.unwrap().success());
    let mut console = socket.receive();
    console.resize(90, 30);
    expect_size(&mut console, "30 90");
    console.type_in("exit 6\n");
    console.rest();
    let pid = std::fs::read_to_string(pid_file).unwrap().parse().unwrap();
    assert_eq!(wait_for(Pid::from_raw(pid)), 6);
}

#[test]
fn a_terminal_that_is_resized_while_its_container_is_paused_has_that_size_afterwards() {
    let _unchanged = Host::unchanged();
    let bundle = with_terminal(&["sh"]);
    let (container, mut console) = create(&bundle);
    container.command(&["start"]).expect_code(0);
    container.command(&["pause"]).expect_code(0);
    console.resize(80, 24);
    console.resize(91, 31);
    assert_eq!(container.status(), "paused");
    container.command(&["resume"]).expect_code(0);
    expect_size(&mut console, "31 91");
}

#[test]
fn a_foreground_terminal_is_raw_while_the_container_runs_and_restored_after_any_end() {
    let unchanged = Host::unchanged();
    for (end, expected) in [
        ("exit", 4),
        ("signal", 3),
        ("failure", 1),
        ("bulkhead-vmm", 255),
        ("containerd-shim-bulkhead-v2", 1),
    ] {
        let (mut console, terminal) = Console::open(83, 25);
        let bundle = if end == "failure" {
            with_terminal(&["nonesuch"])
        } else {
            with_terminal(&[
                "sh",
                "-c",
                "trap 'exit 3' TERM; stty size; echo rea''dy; read line; echo got $line; exit 4",
            ])
        };
        let before = tcgetattr(&terminal).unwrap();
        let mut command = run_command(Command::new(bulkhead()), &bundle);
        let mut child = Console::start(&terminal, &mut command);
        if end == "failure" {
            console.expect("nonesuch");
        } else {
            let shown = console.expect("ready");
            assert!(shown.contains("25 83"), "{shown}");
            let raw = tcgetattr(&terminal).unwrap();
            assert!(!raw.local_flags.contains(LocalFlags::ECHO));
        }
        let end_by = |pid: u32, signal| kill(Pid::from_raw(pid.cast_signed()), signal).unwrap();
        match end {
            "failure" => {}
            "exit" => {
                console.type_in("hello\n");
                console.expect("got hello");
            }
            "signal" => end_by(child.id(), Signal::SIGTERM),
            program => {
                let pids = processes::named(program);
                assert_eq!(pids.len(), 1, "{program}");
                end_by(pids[0], Signal::SIGKILL);
            }
        }
        assert_eq!(child.wait().unwrap().code(), Some(expected), "{end}");
        assert!(
            tcgetattr(&terminal).unwrap() == before,
            "{end}: not restored"
        );
        reap_all();
        unchanged.at_once(end);
    }
}

#[test]
fn a_terminal_without_anybody_to_hold_it_is_refused() {
    let _unchanged = Host::unchanged();
    let bundle = with_terminal(&["sh"]);
    let Err(ended) = Container::try_create(bulkhead(), &bundle, &[]) else {
        panic!("created without a console socket");
    };
    assert_eq!(ended.code, 1);
    assert!(
        ended.stderr.contains("--console-socket"),
        "{}",
        ended.stderr
    );
    let plain = Bundle::busybox(&["true"]);
    let Err(ended) = Container::try_create(bulkhead(), &plain, &["--console-socket", "/nowhere"])
    else {
        panic!("created with a console socket for no terminal");
    };
    assert!(
        ended.stderr.contains("process.terminal"),
        "{}",
        ended.stderr
    );
    let Err(ended) = Container::try_create(bulkhead(), &bundle, &["--console-socket", "/nowhere"])
    else {
        panic!("created with a console socket that nobody listens at");
    };
    assert!(
        ended.stderr.contains("console socket /nowhere"),
        "{}",
        ended.stderr
    );
}

/// Makes `terminal` the controlling one of the session that a command is to begin.
fn control(command: &mut Command, terminal: &File) {
    let terminal = terminal.try_clone().unwrap();
    // SAFETY: system calls between fork and exec, on a descriptor that the closure owns.
    unsafe {
        command.pre_exec(move || {
            setsid()?;
            Errno::result(libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0))?;
            Ok(())
        });
    }
}

#[test]
fn the_terminal_in_the_foreground_is_any_stream_or_else_the_controlling_one() {
    let _unchanged = Host::unchanged();
    for runtime in [runc(), bulkhead()] {
        let container = Container::running(runtime, Bundle::busybox(&["sleep", "1000"]));
        for stream in ["stderr", "stdout", "none"] {
            let (mut console, terminal) = Console::open(83, 25);
            let before = tcgetattr(&terminal).unwrap();
            let mut command = container.prepare(&["exec", "-t"], &["sh"]);
            command.stdin(Stdio::piped());
            let own = || Stdio::from(terminal.try_clone().unwrap());
            match stream {
                "stderr" => command.stdout(Stdio::piped()).stderr(own()),
                "stdout" => command.stdout(own()).stderr(Stdio::piped()),
                _ => {
                    control(&mut command, &terminal);
                    command.stdout(Stdio::piped()).stderr(Stdio::piped())
                }
            };
            let mut child = command.spawn().unwrap();
            let mut typed = child.stdin.take().unwrap();
            typed.write_all(b"stty size; tty; echo rea''dy\n").unwrap();
            let mut stdout = child.stdout.take();
            let mut shown = match &mut stdout {
                Some(stdout) => {
                    let mut shown = String::new();
                    let mut buffer = [0; 4096];
                    while !shown.contains("ready") {
                        let length = stdout.read(&mut buffer).unwrap();
                        assert_ne!(length, 0, "{stream}: {shown}");
                        shown.push_str(&String::from_utf8_lossy(&buffer[..length]));
                    }
                    shown
                }
                None => console.expect("ready"),
            };
            shown.retain(|c| c != '\r');
            assert!(shown.contains("\n25 83\n/dev/pts/"), "{stream}: {shown}");
            let raw = tcgetattr(&terminal).unwrap();
            assert!(!raw.local_flags.contains(LocalFlags::ECHO), "{stream}");
            typed.write_all(b"exit 6\n").unwrap();
            drop(typed);
            if let Some(stdout) = &mut stdout {
                stdout.read_to_end(&mut Vec::new()).unwrap();
            }
            assert_eq!(child.wait().unwrap().code(), Some(6), "{stream}");
            assert!(tcgetattr(&terminal).unwrap() == before, "{stream}");
        }
    }
}

#[test]
fn a_terminal_in_the_foreground_that_is_nowhere_is_refused() {
    let _unchanged = Host::unchanged();
    let container = Container::running(bulkhead(), Bundle::busybox(&["sleep", "1000"]));
    let mut command = container.prepare(&["exec", "-t"], &["sh"]);
    // SAFETY: a system call between fork and exec.
    unsafe { command.pre_exec(|| Ok(setsid().map(drop)?)) };
    let ended = finish(command.stdin(Stdio::null())).expect_code(255);
    assert!(ended.stderr.contains("no terminal"), "{}", ended.stderr);
}

#[test]
fn a_size_that_changes_while_the_guest_boots_is_the_programs_once_it_runs() {
    let _unchanged = Host::unchanged();
    let (mut console, terminal) = Console::open(83, 25);
    let mut bundle = with_terminal(&["sh"]);
    // While it runs the container is not there yet.
    let (began, go) = (bundle.path().join("began"), bundle.path().join("go"));
    mkfifo(&go, Mode::S_IRWXU).unwrap();
    let script = format!(": >{}; read line <{}", began.display(), go.display());
    bundle.config["hooks"] =
        json!({"createRuntime": [{"path": "/bin/sh", "args": ["sh", "-c", script]}]});
    let own = || Stdio::from(terminal.try_clone().unwrap());
    let mut child = run_command(Command::new(bulkhead()), &bundle)
        .stdin(own())
        .stdout(own())
        .stderr(own())
        .spawn()
        .unwrap();
    watch::until(bundle.path(), &[], || began.exists());
    console.resize(97, 41);
    // The kernel would do that, were the terminal its controlling one.
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGWINCH).unwrap();
    std::fs::write(&go, "\n").unwrap();
    expect_size(&mut console, "41 97");
    console.type_in("exit 4\n");
    assert_eq!(child.wait().unwrap().code(), Some(4));
}
