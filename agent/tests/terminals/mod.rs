//! Terminals at their ends: closed and opened again, given up, held by what a process leaves.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use bulkhead_protocol::agent::{Stdio, StreamKind};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::bed::Bed;

fn terminal() -> Stdio {
    Stdio {
        terminal: true,
        ..Default::default()
    }
}

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

pub async fn a_terminal_that_nobody_has_open_can_be_opened_again() {
    let bed = Bed::new().await;
    let again =
        "read go < /tmp/fifo; exec < $t > $t 2>&1; echo back; read line; echo \"<$line>\"; exit 5";
    let close = "exec <&- >&- 2>&-";
    for (index, give_up) in [
        close.to_owned(),
        // The end of a session that has taken the terminal hangs it up.
        format!("setsid -c true < $t; {close}"),
    ]
    .iter()
    .enumerate()
    {
        let fifo = fifo(&bed);
        let script = format!("t=$(tty); {give_up}; {again}");
        let mut spec = bed.spec(&script);
        let capabilities = json!(["CAP_SYS_ADMIN"]);
        for set in ["bounding", "effective", "permitted"] {
            spec["process"]["capabilities"][set] = capabilities.clone();
        }
        spec["process"]["terminal"] = json!(true);
        let id = format!("box{index}");
        bed.create(&id, &spec, terminal()).await.unwrap();
        let mut shown = bed.stream(&id, StreamKind::TERMINAL).await;
        bed.start(&id).await.unwrap();
        let mut go = opened(&fifo).await;
        // The agent has heard of the closed terminal by its answer.
        bed.processes(&id).await.unwrap();
        go.write_all(b"go\n").unwrap();
        let mut back = [0; 6];
        shown.read_exact(&mut back).await.unwrap();
        assert_eq!(&back, b"back\r\n");
        shown.write_all(b"typed\n").await.unwrap();
        let mut rest = String::new();
        shown.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "typed\r\n<typed>\r\n");
        assert_eq!(bed.wait(&id).await.unwrap().exit_code, 5);
        bed.delete(&id).await.unwrap();
    }
}

pub async fn who_holds_a_terminal_does_not_hold_up_the_end_of_its_process() {
    let bed = Bed::new().await;
    bed.running("box").await;
    for (index, left) in ["sleep 1000", "/bin/busybox yes"].iter().enumerate() {
        fifo(&bed);
        // The child takes the terminal away from its parent, whose end hangs nothing up then.
        let script = format!(
            "setsid -c sh -c 'echo taken > /tmp/fifo; exec {left}' <&1 & read taken < /tmp/fifo; echo last; exit 3"
        );
        let mut process = bed.process(&script);
        process["terminal"] = json!(true);
        for set in ["bounding", "effective", "permitted"] {
            process["capabilities"][set] = json!(["CAP_SYS_ADMIN"]);
        }
        let id = format!("exec{index}");
        bed.exec("box", &id, &process, terminal()).await.unwrap();
        let mut shown = bed.stream_of("box", &id, StreamKind::TERMINAL).await;
        let mut output = String::new();
        let (exit, read) =
            tokio::join!(bed.wait_exec("box", &id), shown.read_to_string(&mut output));
        read.unwrap();
        assert_eq!(exit.unwrap().exit_code, 3);
        assert!(output.contains("last\r\n"), "{output}");
    }
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
