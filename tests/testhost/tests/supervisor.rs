//! The failure policy, against a machine that only pretends: a sleeping process in QEMU's place, and this test in
//! the init's.

// Helpers of tests are no tests to clippy.
#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;
use testhost::frame::{Configure, Frame, Message, Start, Stdio, VERSION};
use testhost::machine::Machine;
use testhost::supervisor::{Host, HostFailure, Patience};

/// The init's ends of the two channels, and the process in QEMU's place.
struct Inside {
    port: UnixStream,
    console: UnixStream,

    pid: i32,
}

impl Inside {
    fn say(&self, frame: Frame) {
        frame.write_to(&self.port).unwrap();
    }

    fn hear(&self) -> Frame {
        loop {
            let frame = Frame::read_from(&self.port).unwrap().unwrap();
            if frame.message != Message::Ping {
                return frame;
            }
        }
    }

    /// The init's side of a boot.
    fn boot(&self) {
        self.say(Frame::control(Message::Hello(VERSION)));
        assert!(matches!(self.hear().message, Message::Configure(_)));
        self.say(Frame::control(Message::Ready(1)));
    }

    fn print(&self, text: &str) {
        (&self.console).write_all(text.as_bytes()).unwrap();
    }

    fn kill_machine(&self) {
        let pid = nix::unistd::Pid::from_raw(self.pid);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    }
}

fn pretend(patience: Patience, init: impl FnOnce(&Inside)) -> (Result<Host, HostFailure>, Inside) {
    let (port, port_inside) = UnixStream::pair().unwrap();
    let (console, console_inside) = UnixStream::pair().unwrap();
    let (monitor, _) = UnixStream::pair().unwrap();
    let child = Command::new("sleep").arg("1000").spawn().unwrap();
    let inside = Inside {
        port: port_inside,
        console: console_inside,

        pid: child.id() as i32,
    };
    let machine = Machine {
        child,
        port,
        console,
        monitor,
    };
    let folder = tempfile::tempdir().unwrap();
    let log = std::fs::File::create(folder.path().join("console.log")).unwrap();
    let qemu_log = folder.path().join("qemu.log");
    let result = std::thread::scope(|scope| {
        let booted = scope.spawn(|| {
            Host::boot(
                machine,
                Configure::default(),
                patience,
                log,
                qemu_log,
                Arc::new(|_: &str| ()),
            )
        });
        init(&inside);
        booted.join().unwrap()
    });
    (result, inside)
}

fn patient() -> Patience {
    Patience {
        boot: Duration::from_secs(60),
        heartbeat: Duration::from_secs(60),
    }
}

fn up() -> (Host, Inside) {
    let (host, inside) = pretend(patient(), Inside::boot);
    (host.unwrap(), inside)
}

/// A client whose command runs; gives the stream that the init knows it by.
fn start(host: &Host, inside: &Inside) -> (UnixStream, u32) {
    let (client, theirs) = UnixStream::pair().unwrap();
    let server = host.clone();
    std::thread::spawn(move || server.serve(theirs, None));
    Frame::new(7, Message::Start(Start::default()))
        .write_to(&client)
        .unwrap();
    let frame = inside.hear();
    assert!(matches!(frame.message, Message::Start(_)));
    (client, frame.stream)
}

fn answer(client: &UnixStream) -> Message {
    let frame = Frame::read_from(client).unwrap().unwrap();
    frame.message
}

#[test]
fn output_and_exit_code_reach_the_client_under_its_own_stream() {
    let (host, inside) = up();
    let (client, stream) = start(&host, &inside);
    let (second, other) = start(&host, &inside);
    assert_ne!(stream, other);
    let output = Message::Data(Stdio::Out, b"x".to_vec());
    inside.say(Frame::new(stream, output.clone()));
    inside.say(Frame::new(stream, Message::Exit(3)));
    assert_eq!(
        Frame::read_from(&client).unwrap().unwrap(),
        Frame::new(7, output)
    );
    assert_eq!(answer(&client), Message::Exit(3));
    inside.say(Frame::new(other, Message::Exit(0)));
    assert_eq!(answer(&second), Message::Exit(0));
    host.kill();
    assert!(host.failure().is_some(), "ended without close()");
}

#[test]
fn a_panic_on_the_console_is_the_hosts_failure_and_not_the_commands() {
    let (host, inside) = up();
    let (client, _) = start(&host, &inside);
    inside.print(
        "[    9.0] before\n[    9.1] Kernel panic - not syncing: corrupted stack end\n trace\n",
    );
    inside.kill_machine();
    let Message::HostFailed(reason, tail) = answer(&client) else {
        panic!("not told of the failure");
    };
    assert!(reason.contains("its kernel failed"), "{reason}");
    assert!(tail.contains("before") && tail.contains("trace"), "{tail}");
    host.wait();
    assert!(host.failure().is_some());
}

#[test]
fn a_machine_that_ends_or_is_silent_has_failed() {
    let (host, inside) = up();
    let (client, _) = start(&host, &inside);
    inside.kill_machine();
    assert!(matches!(answer(&client), Message::HostFailed(..)));
    host.wait();

    let patience = Patience {
        heartbeat: Duration::from_millis(50),
        ..patient()
    };
    let (host, _inside) = pretend(patience, Inside::boot);
    let host = host.unwrap();
    host.wait();
    let failure = host.failure().unwrap();
    assert!(failure.reason.contains("no heartbeat"), "{failure}");
}

#[test]
fn a_command_started_on_a_failed_host_is_told_so() {
    let (host, inside) = up();
    inside.kill_machine();
    host.wait();
    let (client, theirs) = UnixStream::pair().unwrap();
    let server = host.clone();
    std::thread::spawn(move || server.serve(theirs, None));
    Frame::new(1, Message::Start(Start::default()))
        .write_to(&client)
        .unwrap();
    assert!(matches!(answer(&client), Message::HostFailed(..)));
}

#[test]
fn a_stall_counts_only_against_a_command_that_then_fails() {
    let (host, inside) = up();
    let (good, good_stream) = start(&host, &inside);
    let (bad, bad_stream) = start(&host, &inside);
    inside.print("[   99.0] rcu: INFO: rcu_preempt self-detected stall on CPU\n");
    // The console and the port are different channels: wait until the line has been taken in.
    while !host.console_tail().contains("stall") {
        std::thread::yield_now();
    }
    inside.say(Frame::new(good_stream, Message::Exit(0)));
    assert_eq!(answer(&good), Message::Exit(0));
    inside.say(Frame::new(bad_stream, Message::Exit(1)));
    assert!(matches!(answer(&bad), Message::HostFailed(..)));

    let (host, inside) = up();
    inside.print("[   99.0] rcu: INFO: rcu_preempt self-detected stall on CPU\n");
    while !host.console_tail().contains("stall") {
        std::thread::yield_now();
    }
    let (later, stream) = start(&host, &inside);
    inside.say(Frame::new(stream, Message::Exit(1)));
    assert_eq!(answer(&later), Message::Exit(1));
    host.kill();
}

#[test]
fn a_boot_that_fails_says_why() {
    let (host, _inside) = pretend(patient(), |inside| {
        inside.say(Frame::control(Message::SetupFailed("no root".into())));
    });
    let failure = host.err().unwrap();
    assert!(failure.in_setup && failure.reason.contains("no root"));
    let (host, _inside) = pretend(patient(), |inside| {
        inside.say(Frame::control(Message::Hello(VERSION + 1)));
    });
    assert!(host.err().unwrap().reason.contains("version"));
    let patience = Patience {
        boot: Duration::from_millis(50),
        ..patient()
    };
    let (host, _inside) = pretend(patience, |_| ());
    let failure = host.err().unwrap();
    assert!(!failure.in_setup && failure.reason.contains("not ready"));
}

#[test]
fn a_client_that_goes_takes_its_command_with_it() {
    let (host, inside) = up();
    let (client, stream) = start(&host, &inside);
    drop(client);
    assert_eq!(inside.hear(), Frame::new(stream, Message::HangUp));
    host.kill();
}

#[test]
fn closing_unmounts_before_it_kills() {
    let (host, inside) = up();
    let closer = host.clone();
    let closing = std::thread::spawn(move || closer.close());
    assert_eq!(inside.hear().message, Message::Shutdown);
    inside.say(Frame::control(Message::Bye));
    closing.join().unwrap();
    assert!(host.failure().is_none());
}
