//! Descriptors of the caller beyond the standard streams.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use bulkhead_e2e::command::hand_over;

use crate::assert_sentence;
use crate::bed::{Bed, PATIENCE, bulkhead, text};

fn pipe() -> (OwnedFd, OwnedFd) {
    let (reader, writer) = std::io::pipe().unwrap();
    (reader.into(), writer.into())
}

/// A file of that content, open for reading.
fn file_of(bed: &Bed, content: &str) -> OwnedFd {
    fs::write(bed.path("file"), content).unwrap();
    fs::File::open(bed.path("file")).unwrap().into()
}

#[test]
fn descriptors_of_the_caller_are_streams_of_the_process() {
    let script =
        "cat <&3 >&4; exec 4>&-; cat <&5 >&5; exec 5>&-; cat <&6; cat <&7; cat >/dev/null; exit 4";
    let bed = Bed::new(&["/bin/sh", "-c", script]);
    let (inward, feed) = pipe();
    let (drain, outward) = pipe();
    let (socket, peer) = UnixStream::pair().unwrap();
    let null = fs::File::open("/dev/null").unwrap();
    let mut file = fs::File::from(file_of(&bed, "passed over, the rest\n"));
    file.read_exact(&mut [0; 13]).unwrap();
    let mut command = bed.command();
    command.args(["--preserve-fds", "5"]).stdin(Stdio::piped());
    let given = [inward, outward, socket.into(), null.into(), file.into()];
    hand_over(&mut command, given);
    let mut child = command.spawn().unwrap();
    // Its closure holds ours.
    drop(command);
    let data: Vec<u8> = (0..1_000_000u32).map(|i| (i % 251) as u8).collect();
    let expected = data.clone();
    let feeder = std::thread::spawn(move || fs::File::from(feed).write_all(&data).unwrap());
    let mut received = Vec::new();
    // Each ends as soon as the process has closed it.
    fs::File::from(drain).read_to_end(&mut received).unwrap();
    assert!(received == expected);
    feeder.join().unwrap();
    (&peer).write_all(b"question").unwrap();
    peer.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    (&peer).read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "question");
    drop(child.stdin.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(text(&output.stdout), "the rest\n");
    assert_eq!(output.status.code(), Some(4), "{}", text(&output.stderr));
    bed.assert_clean();
}

#[test]
fn a_stand_in_carries_the_descriptors_of_who_called_create() {
    let script = "echo $LISTEN_FDS $LISTEN_PID >&3; cat <&4 >&3";
    let bed = Bed::new(&["/bin/sh", "-c", script]);
    let (drain, outward) = pipe();
    // As a service manager does, which knows the pid of its child.
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"", "sh"])
        .arg(bulkhead())
        .arg("--config")
        .arg(bed.path("config.toml"))
        .args(["create", "--preserve-fds", "1", "c1"])
        .current_dir(bed.path("bundle"))
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    hand_over(&mut command, [outward, file_of(&bed, "content\n")]);
    assert!(command.status().unwrap().success());
    drop(command);
    let started = bed.about(&["start", "c1"]);
    assert!(started.status.success(), "{}", text(&started.stderr));
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut written = String::new();
        let read = fs::File::from(drain).read_to_string(&mut written);
        sender.send(read.map(|_| written))
    });
    let written = receiver.recv_timeout(PATIENCE);
    let deleted = bed.about(&["delete", "--force", "c1"]);
    assert!(deleted.status.success(), "{}", text(&deleted.stderr));
    assert_eq!(written.unwrap().unwrap(), "1 1\ncontent\n");
    bed.await_clean();
}

#[test]
fn a_descriptor_that_is_no_stream_is_refused_before_anything_starts() {
    let bed = Bed::new(&["/bin/true"]);
    let directory = || fs::File::open("/").unwrap().into();
    let (reader, _writer) = pipe();
    let mut command = bed.command();
    command.args(["--preserve-fds", "2"]);
    hand_over(&mut command, [reader, directory()]);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_sentence(&output, "--preserve-fds 2: descriptor 4 is a directory;");
    assert!(!bed.path("state").exists());

    let mut command = bed.command();
    command.args(["--preserve-fds", "2"]);
    hand_over(&mut command, [file_of(&bed, "")]);
    let output = command.output().unwrap();
    assert_sentence(&output, "preserved-fd 1 (of 2): descriptor 4 is not open");

    // What is meant for another process is not ours to pass on.
    let mut command = bed.command();
    command.envs([("LISTEN_FDS", "1"), ("LISTEN_PID", "1")]);
    hand_over(&mut command, [directory()]);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    bed.assert_clean();
}
