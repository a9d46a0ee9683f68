//! Reads the emulated host's console for signs that the host itself, not what runs in it, has failed.

use std::collections::VecDeque;

/// How many lines are kept to be shown with a failure.
const TAIL_LINES: usize = 60;
/// Longer lines are cut: a broken host may print anything.
const MAX_LINE: usize = 4096;

/// How bad a console line is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Worth showing; proves nothing.
    Notice,
    /// The host may have misbehaved: a command that failed after it is the bed's failure, one that succeeded stands.
    Suspect,
    /// The host is lost.
    Fatal,
}

/// Text that the kernel prints when it is in trouble. The first match counts.
const PATTERNS: &[(&str, Severity)] = &[
    ("Kernel panic - not syncing", Severity::Fatal),
    ("corrupted stack end detected", Severity::Fatal),
    ("stack guard page was hit", Severity::Fatal),
    ("BUG: unable to handle", Severity::Fatal),
    ("BUG: kernel NULL pointer", Severity::Fatal),
    ("BUG: stack guard page", Severity::Fatal),
    ("kernel BUG at", Severity::Fatal),
    ("Oops: ", Severity::Fatal),
    ("general protection fault, ", Severity::Fatal),
    ("double fault: ", Severity::Fatal),
    ("invalid opcode: 0000 [#", Severity::Fatal),
    ("Unable to mount root", Severity::Fatal),
    ("soft lockup - CPU#", Severity::Suspect),
    ("hard LOCKUP", Severity::Suspect),
    ("detected stalls on CPUs", Severity::Suspect),
    ("self-detected stall on CPU", Severity::Suspect),
    ("detected expedited stalls", Severity::Suspect),
    ("kthread starved for", Severity::Suspect),
    ("BUG: scheduling while atomic", Severity::Suspect),
    ("BUG: Bad page state", Severity::Suspect),
    ("BUG: workqueue lockup", Severity::Suspect),
    ("Bad page map", Severity::Suspect),
    ("unhandled VMEXIT", Severity::Suspect),
    ("INFO: task ", Severity::Notice),
    ("WARNING: CPU:", Severity::Notice),
    ("Out of memory: ", Severity::Notice),
];

/// A line that means something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// The line, without its time stamp's padding.
    pub line: String,
}

/// Judges one line.
pub fn judge(line: &str) -> Option<Finding> {
    PATTERNS
        .iter()
        .find(|(pattern, _)| line.contains(pattern))
        .map(|(_, severity)| Finding {
            severity: *severity,
            line: line.trim().to_owned(),
        })
}

/// Cuts the console's bytes into lines, judges them and keeps the last ones.
#[derive(Debug, Default)]
pub struct Watch {
    partial: Vec<u8>,
    tail: VecDeque<String>,
}

impl Watch {
    /// Takes the next bytes; returns what the lines completed by them tell.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<Finding> {
        let mut findings = vec![];
        for &byte in bytes {
            match byte {
                b'\n' => findings.extend(self.end_line()),
                b'\r' => {}
                _ => {
                    self.partial.push(byte);
                    if self.partial.len() >= MAX_LINE {
                        findings.extend(self.end_line());
                    }
                }
            }
        }
        findings
    }

    fn end_line(&mut self) -> Option<Finding> {
        let line = String::from_utf8_lossy(&std::mem::take(&mut self.partial)).into_owned();
        let finding = judge(&line);
        if self.tail.len() == TAIL_LINES {
            self.tail.pop_front();
        }
        self.tail.push_back(line);
        finding
    }

    /// The last lines, the unfinished one included.
    pub fn tail(&self) -> String {
        let partial = String::from_utf8_lossy(&self.partial);
        let mut lines: Vec<&str> = self.tail.iter().map(String::as_str).collect();
        if !partial.is_empty() {
            lines.push(&partial);
        }
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn console_lines_are_judged_by_what_they_prove() {
        let table = [
            (
                "[   42.1] Kernel panic - not syncing: corrupted stack end detected inside scheduler",
                Some(Severity::Fatal),
            ),
            (
                "[   42.1] Kernel panic - not syncing: sysrq triggered crash",
                Some(Severity::Fatal),
            ),
            (
                "[    9.9] BUG: TASK stack guard page was hit at 0000000012345678",
                Some(Severity::Fatal),
            ),
            (
                "[    9.9] BUG: unable to handle page fault for address: ffffc90000",
                Some(Severity::Fatal),
            ),
            (
                "[    9.9] Oops: 0000 [#1] PREEMPT SMP NOPTI",
                Some(Severity::Fatal),
            ),
            (
                "[    9.9] general protection fault, probably for non-canonical address 0xdead: 0000 [#1]",
                Some(Severity::Fatal),
            ),
            (
                "[   99.0] rcu: INFO: rcu_preempt self-detected stall on CPU",
                Some(Severity::Suspect),
            ),
            (
                "[   99.0] rcu: INFO: rcu_sched detected stalls on CPUs/tasks:",
                Some(Severity::Suspect),
            ),
            (
                "[   99.0] watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [qemu:1]",
                Some(Severity::Suspect),
            ),
            (
                "[  120.0] INFO: task virtiofs:12 blocked for more than 120 seconds.",
                Some(Severity::Notice),
            ),
            (
                "[    1.0] WARNING: CPU: 0 PID: 1 at kernel/x.c:1 f+0x1/0x2",
                Some(Severity::Notice),
            ),
            ("[    1.0] kvm: Nested Virtualization enabled", None),
            // A process's own fault is the process's business.
            (
                "[    3.0] traps: app[77] general protection fault ip:401000 sp:7ffc error:0",
                None,
            ),
            ("[    3.0] app[77]: segfault at 0 ip 0000000000401000", None),
        ];
        for (line, expected) in table {
            assert_eq!(judge(line).map(|f| f.severity), expected, "{line}");
        }
    }

    #[test]
    fn a_line_split_over_reads_is_seen_once_and_carriage_returns_are_dropped() {
        let mut watch = Watch::default();
        assert!(watch.feed(b"quiet\r\n[ 1.0] Kernel pa").is_empty());
        let findings = watch.feed(b"nic - not syncing: x\r\nrest");
        assert_eq!(findings.len(), 1);
        assert_eq!(findings[0].line, "[ 1.0] Kernel panic - not syncing: x");
        assert_eq!(
            watch.tail(),
            "quiet\n[ 1.0] Kernel panic - not syncing: x\nrest"
        );
    }

    #[test]
    fn the_tail_and_the_lines_in_it_are_bounded() {
        let mut watch = Watch::default();
        watch.feed(&vec![b'x'; 10 * MAX_LINE]);
        for n in 0..1000 {
            watch.feed(format!("line {n}\n").as_bytes());
        }
        assert_eq!(watch.tail().lines().count(), TAIL_LINES);
        assert!(watch.tail().ends_with("line 999"));
    }
}
