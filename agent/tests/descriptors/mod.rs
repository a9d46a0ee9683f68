//! Descriptors of a process beyond its standard streams.

use std::time::Duration;

use bulkhead_protocol::MAX_DESCRIPTORS;
use bulkhead_protocol::agent::{Flow, Stdio, StreamKind};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;
use ttrpc::Code;

use crate::bed::Bed;
use crate::in_user_namespace;

fn with(flows: &[Flow]) -> Stdio {
    Stdio {
        stdout: true,
        descriptors: flows.iter().map(|&flow| flow.into()).collect(),
        ..Default::default()
    }
}

/// The standard output of a process, to its end.
async fn output(bed: &Bed, exec_id: &str, kind: StreamKind) -> String {
    let mut stdout = bed.stream_of("box", exec_id, kind).await;
    let mut output = String::new();
    stdout.read_to_string(&mut output).await.unwrap();
    output
}

pub async fn descriptors_are_there_by_their_numbers() {
    let bed = Bed::new().await;
    let flows = [Flow::NOWHERE, Flow::INWARD, Flow::OUTWARD, Flow::BOTH_WAYS];
    let script = "for fd in 0 3 4 5 6 7; do readlink /proc/self/fd/$fd | tr -d '[:digit:]'; done; \
                  grep flags: /proc/self/fdinfo/4 /proc/self/fdinfo/5; exec ls -1 /proc/self/fd";
    // The last is the directory that ls reads.
    let expected = "/dev/null\n/dev/null\npipe:[]\npipe:[]\nsocket:[]\n\
                    /proc/self/fdinfo/4:flags:\t00\n/proc/self/fdinfo/5:flags:\t01\n0\n1\n2\n3\n4\n5\n6\n7\n";
    bed.create("box", &bed.spec(script), with(&flows))
        .await
        .unwrap();
    bed.start("box").await.unwrap();
    assert_eq!(output(&bed, "", StreamKind::STDOUT).await, expected);
    bed.delete("box").await.unwrap();

    bed.running("box").await;
    bed.exec("box", "one", &bed.process(script), with(&flows))
        .await
        .unwrap();
    assert_eq!(output(&bed, "one", StreamKind::STDOUT).await, expected);
    // Beside a terminal too.
    let mut process = bed.process(script);
    process["terminal"] = json!(true);
    let stdio = Stdio {
        terminal: true,
        ..with(&flows)
    };
    bed.exec("box", "two", &process, stdio).await.unwrap();
    let shown = output(&bed, "two", StreamKind::TERMINAL).await;
    let expected = expected.replacen("/dev/null", "/dev/pts/", 1);
    assert_eq!(shown.replace('\r', ""), expected);
}

pub async fn descriptors_carry_bytes_whole_and_end() {
    let bed = Bed::new().await;
    let data: Vec<u8> = (0..3_000_000)
        .map(|number: u32| (number % 251) as u8)
        .collect();
    let flows = [Flow::INWARD, Flow::OUTWARD, Flow::BOTH_WAYS];
    let script = "cat <&3 >&4; exec 4>&-; cat <&5 >&5; exec 5>&-; exec cat";
    let stdio = Stdio {
        stdin: true,
        ..with(&flows)
    };
    bed.running("other").await;
    for exec_id in ["", "one"] {
        let id = if exec_id.is_empty() {
            bed.create("box", &bed.spec(script), stdio.clone())
                .await
                .unwrap();
            bed.start("box").await.unwrap();
            "box"
        } else {
            bed.exec("other", exec_id, &bed.process(script), stdio.clone())
                .await
                .unwrap();
            "other"
        };
        let stdin = bed.stream_of(id, exec_id, StreamKind::STDIN).await;
        let mut inward = bed.descriptor(id, exec_id, 3).await;
        let mut outward = bed.descriptor(id, exec_id, 4).await;
        let mut received = Vec::new();
        let write = async {
            inward.write_all(&data).await.unwrap();
            inward.shutdown().await.unwrap();
        };
        // It ends as soon as the process has closed it.
        let (_, read) = tokio::join!(write, outward.read_to_end(&mut received));
        read.unwrap();
        assert!(received == data);

        let (mut from, mut to) = bed.descriptor(id, exec_id, 5).await.into_split();
        let mut received = Vec::new();
        let write = async {
            to.write_all(&data).await.unwrap();
            to.shutdown().await.unwrap();
        };
        let (_, read) = tokio::join!(write, from.read_to_end(&mut received));
        read.unwrap();
        assert!(received == data);
        drop(stdin);
        let mut stdout = bed.stream_of(id, exec_id, StreamKind::STDOUT).await;
        assert_eq!(stdout.read(&mut [0; 1]).await.unwrap(), 0);
        assert_eq!(bed.wait_exec(id, exec_id).await.unwrap().exit_code, 0);
    }
}

pub async fn descriptors_leave_room_for_what_an_init_needs_itself() {
    let bed = Bed::new().await;
    // In a user namespace the init mounts copies that the agent has open, at numbers among those wanted here.
    let flows = [Flow::INWARD; MAX_DESCRIPTORS];
    let mut spec = in_user_namespace(&bed, "cat <&3; cat /proc/self/fd/66; cat /data/plain");
    // Who may open it anew, it belongs to.
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let bind = json!({"destination": "/data/plain", "type": "bind", "source": bed.rootfs().join("etc/plain"),
        "options": ["bind"]});
    std::fs::write(bed.rootfs().join("data/plain"), "").unwrap();
    spec["mounts"].as_array_mut().unwrap().push(bind);
    bed.create("box", &spec, with(&flows)).await.unwrap();
    for (number, word) in [(66, "last\n"), (3, "first\n")] {
        let mut stream = bed.descriptor("box", "", number).await;
        stream.write_all(word.as_bytes()).await.unwrap();
    }
    bed.start("box").await.unwrap();
    assert_eq!(
        output(&bed, "", StreamKind::STDOUT).await,
        "first\nlast\nno program\n"
    );
    assert_eq!(bed.wait("box").await.unwrap().exit_code, 0);
    bed.delete("box").await.unwrap();

    let flows = [Flow::INWARD; MAX_DESCRIPTORS + 1];
    let refused = bed.create("box", &spec, with(&flows)).await.unwrap_err();
    assert_eq!(
        refused,
        (
            Code::INVALID_ARGUMENT,
            format!("stdio.descriptors: more than {MAX_DESCRIPTORS}")
        )
    );
}

pub async fn a_reader_of_a_descriptor_that_goes_away_ends_the_writer() {
    let bed = Bed::new().await;
    bed.running("box").await;
    for flow in [Flow::OUTWARD, Flow::BOTH_WAYS] {
        let process = bed.process("while :; do echo x; done >&3");
        bed.exec("box", "one", &process, with(&[flow]))
            .await
            .unwrap();
        let stdout = bed.stream_of("box", "one", StreamKind::STDOUT).await;
        let mut stream = bed.descriptor("box", "one", 3).await;
        stream.read_exact(&mut [0; 2]).await.unwrap();
        drop((stream, stdout));
        let exit = bed.wait_exec("box", "one").await.unwrap();
        assert_eq!(exit.exit_code, 128 + 13, "{flow:?}");
        bed.delete_exec("box", "one").await.unwrap();
    }
}

pub async fn an_exit_comes_after_the_last_byte_of_every_descriptor() {
    let bed = Bed::new().await;
    bed.running("box").await;
    for flow in [Flow::OUTWARD, Flow::BOTH_WAYS] {
        let stdio = Stdio {
            stdout: false,
            ..with(&[flow])
        };
        let process = bed.process("sleep 1000 & head -c 60000 /dev/zero >&3; exit 3");
        bed.exec("box", "one", &process, stdio).await.unwrap();
        let waiting = bed.wait_exec("box", "one");
        tokio::pin!(waiting);
        let early = timeout(Duration::from_millis(300), &mut waiting).await;
        assert!(early.is_err(), "{flow:?}");
        let mut stream = bed.descriptor("box", "one", 3).await;
        assert_eq!(waiting.await.unwrap().exit_code, 3);
        let mut data = Vec::new();
        stream.read_to_end(&mut data).await.unwrap();
        assert_eq!(data.len(), 60_000, "{flow:?}");
        bed.delete_exec("box", "one").await.unwrap();
    }
}
