//! Terminals at their ends: closed and opened again, given up, held by what a process leaves.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use bulkhead_protocol::agent::{Stdio, StreamKind};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use tokio::io::AsyncReadExt;

use crate::bed::Bed;

fn fifo(bed: &Bed) -> PathBuf {
    let path = bed.rootfs().join("tmp/fifo");
    let _ = fs::remove_file(&path);
    mkfifo(&path, Mode::from_bits_truncate(0o666)).unwrap();
    path
}

/// Opens a FIFO for writing once somebody has it open for reading.
async fn opened(fifo: &Path) -> fs::File {
    let fifo = fifo.to_owned();
    tokio::task::spawn_blocking(move || OpenOptions::new().write(true).open(fifo).unwrap())
        .await
        .unwrap()
}

pub async fn who_writes_on_does_not_hold_up_the_end_of_a_process() {
    let bed = Bed::new().await;
    bed.running("box").await;
    let stdio = Stdio {
        stdout: true,
        ..Default::default()
    };
    let fifo = fifo(&bed);
    let process = bed.process("/bin/busybox yes & read go < /tmp/fifo; exit 4");
    bed.exec("box", "one", &process, stdio).await.unwrap();
    let mut output = bed.stream_of("box", "one", StreamKind::STDOUT).await;
    let mut buffer = [0; 4096];
    output.read_exact(&mut buffer).await.unwrap();
    opened(&fifo).await.write_all(b"go\n").unwrap();
    // A reader that is slower than the writer.
    while output.read(&mut buffer).await.unwrap() > 0 {
        bed.processes("box").await.unwrap();
    }
    assert_eq!(bed.wait_exec("box", "one").await.unwrap().exit_code, 4);
}
