//! Asks QEMU what the CPU of a silent host is doing, over QMP (qemu: docs/interop/qmp-spec.rst).

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// A QEMU that doesn't answer at once doesn't answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// The same question several times shows whether the CPU moves.
const QUESTIONS: &[&str] = &[
    "info registers",
    "info lapic",
    "info irq",
    "info registers",
    "info registers",
    "info status",
];

/// What QEMU answers, each line marked; or that it doesn't.
pub fn examine(monitor: &UnixStream) -> String {
    let mut text = String::new();
    if let Err(error) = ask(monitor, &mut text) {
        text += &format!("\nqemu: no answer: {error}");
    }
    text
}

fn ask(monitor: &UnixStream, text: &mut String) -> std::io::Result<()> {
    monitor.set_read_timeout(Some(PATIENCE))?;
    monitor.set_write_timeout(Some(PATIENCE))?;
    let mut answers = BufReader::new(monitor).lines();
    let mut command = |value: serde_json::Value| -> std::io::Result<serde_json::Value> {
        let mut to = monitor;
        to.write_all(format!("{value}\n").as_bytes())?;
        for line in answers.by_ref() {
            // Greetings and events come in between.
            let answer: serde_json::Value = serde_json::from_str(&line?)?;
            if answer.get("return").is_some() || answer.get("error").is_some() {
                return Ok(answer);
            }
        }
        Err(std::io::ErrorKind::UnexpectedEof.into())
    };
    command(serde_json::json!({"execute": "qmp_capabilities"}))?;
    for question in QUESTIONS {
        let answer = command(serde_json::json!({
            "execute": "human-monitor-command",
            "arguments": {"command-line": question},
        }))?;
        let said = answer.get("return").and_then(|r| r.as_str()).unwrap_or("");
        *text += &format!("\nqemu: {question}:");
        for line in said.lines().map(str::trim_end).filter(|l| !l.is_empty()) {
            *text += "\nqemu:   ";
            *text += line;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_told_from_greetings_and_events() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let qemu = std::thread::spawn(move || {
            let mut to = &theirs;
            to.write_all(b"{\"QMP\": {}}\n").unwrap();
            for line in BufReader::new(&theirs).lines() {
                let reply = match line.unwrap().contains("qmp_capabilities") {
                    true => "{\"return\": {}}\n",
                    false => "{\"event\": \"STOP\"}\n{\"return\": \"RIP=1\\r\\nHLT=1\\r\\n\"}\n",
                };
                to.write_all(reply.as_bytes()).unwrap();
            }
        });
        let text = examine(&ours);
        drop(ours);
        qemu.join().unwrap();
        assert!(text.starts_with("\nqemu: info registers:\nqemu:   RIP=1\nqemu:   HLT=1"));
        assert!(!text.contains("STOP"));
    }

    #[test]
    fn a_qemu_that_is_gone_is_said_to_be() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(examine(&ours).contains("no answer"));
    }
}
