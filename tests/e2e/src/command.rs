//! Calling the programs under test.

use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use crate::bundle::Bundle;
use crate::dist;
use crate::leaks::Host;

/// How a command ended, and what it said.
#[derive(Debug)]
pub struct Ended {
    /// Exit code; 128 + N when a signal ended the command itself.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Ended {
    /// Checks the exit code, showing all output when it differs.
    ///
    /// # Panics
    /// When it differs.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(
            self.code, code,
            "stdout: {}\nstderr: {}",
            self.stdout, self.stderr
        );
        self
    }
}

/// A container id that no other test of this process uses.
pub fn fresh_id() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!(
        "e2e-{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    )
}

/// `bulkhead` of the build under test.
pub fn bulkhead() -> PathBuf {
    dist().join("bin/bulkhead")
}

/// Debian's runc, to compare with: it has the same command line.
pub fn runc() -> PathBuf {
    "runc".into()
}

/// `<runtime> run --bundle BUNDLE ID`, config.json written first.
pub fn run_command(mut runtime: Command, bundle: &Bundle) -> Command {
    bundle.write();
    runtime
        .arg("run")
        .arg("--bundle")
        .arg(bundle.path())
        .arg(fresh_id());
    runtime
}

/// Runs a bundle to its end with no input.
pub fn run(bundle: &Bundle) -> Ended {
    finish(run_command(Command::new(bulkhead()), bundle).stdin(Stdio::null()))
}

/// Runs the bundle under runc and under Bulkhead; standard output and exit code must be the same, and nothing left.
///
/// # Panics
/// When they differ.
#[track_caller]
pub fn assert_same_as_runc(bundle: &Bundle) {
    let theirs = finish(run_command(Command::new(runc()), bundle).stdin(Stdio::null()));
    let unchanged = Host::unchanged();
    let ours = run(bundle);
    assert_eq!(
        (ours.code, ours.stdout.as_str()),
        (theirs.code, theirs.stdout.as_str()),
        "bulkhead (left) and runc (right) differ; stderr of bulkhead: {}, of runc: {}",
        ours.stderr,
        theirs.stderr
    );
    unchanged.at_once("run");
}

/// Runs a bundle to its end with some input.
///
/// # Panics
/// When the command can't be started.
pub fn run_with_input(bundle: &Bundle, input: &[u8]) -> Ended {
    let mut child = start(run_command(Command::new(bulkhead()), bundle).stdin(Stdio::piped()));
    let mut stdin = child.stdin.take().unwrap();
    std::thread::scope(|scope| {
        // A container that ends early closes the pipe: not an error of the test.
        scope.spawn(move || drop(stdin.write_all(input)));
        wait(child)
    })
}

/// Hands descriptors to a command, from 3 on. They are closed here when the command is dropped.
///
/// # Panics
/// When they can't be duplicated.
pub fn hand_over(command: &mut Command, descriptors: impl IntoIterator<Item = OwnedFd>) {
    // Two steps, so that none takes the place of another that is still to be moved.
    let aside: Vec<OwnedFd> = descriptors
        .into_iter()
        .map(|fd| {
            let aside = fcntl(&fd, FcntlArg::F_DUPFD_CLOEXEC(100)).unwrap();
            // SAFETY: the call has just made this descriptor.
            unsafe { OwnedFd::from_raw_fd(aside) }
        })
        .collect();
    // SAFETY: system calls between fork and exec, on descriptors that the closure owns and on numbers.
    unsafe {
        command.pre_exec(move || {
            for (number, fd) in (3..).zip(&aside) {
                Errno::result(libc::dup2(fd.as_raw_fd(), number))?;
            }
            Ok(())
        });
    }
}

/// Starts a command with its output captured.
///
/// # Panics
/// When it can't be started.
pub fn start(command: &mut Command) -> Child {
    command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Runs a command to its end.
pub fn finish(command: &mut Command) -> Ended {
    wait(start(command))
}

/// Waits for a started command.
///
/// # Panics
/// When it can't be waited for.
pub fn wait(child: Child) -> Ended {
    use std::os::unix::process::ExitStatusExt;
    let output = child.wait_with_output().unwrap();
    Ended {
        code: output
            .status
            .code()
            .unwrap_or_else(|| 128 + output.status.signal().unwrap_or(0)),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}
