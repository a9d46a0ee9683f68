//! How often an idle sandbox wakes up: each time costs the host power and a busy neighbour his cache.

use std::collections::BTreeMap;
use std::fs;
use std::thread::sleep;
use std::time::Duration;

use anyhow::Context;

use crate::idle::{IdleSandbox, name};
use crate::table::print;

/// How long a sandbox is let alone before it counts as idle: what a boot left to be done later is done then.
pub const SETTLE: Duration = Duration::from_secs(20);

/// How long it is watched.
pub const WATCH: Duration = Duration::from_secs(60);

/// Prints how often each thread of an idle sandbox went to sleep again within a minute. A vCPU sleeps when its guest halts.
pub fn measure() -> anyhow::Result<()> {
    let sandbox = IdleSandbox::start()?;
    sleep(SETTLE);
    let before = switches(&sandbox.pids)?;
    sleep(WATCH);
    let after = switches(&sandbox.pids)?;
    let mut rows = Vec::new();
    for (thread, count) in &after {
        let woken = count - before.get(thread).unwrap_or(&0);
        if woken > 0 {
            rows.push(vec![thread.clone(), woken.to_string()]);
        }
    }
    let total: u64 = after.values().sum::<u64>() - before.values().sum::<u64>();
    rows.push(vec!["all threads".to_owned(), total.to_string()]);
    print(
        &format!("Wake-ups of an idle sandbox in {} s", WATCH.as_secs()),
        &["thread", "wake-ups"],
        &rows,
    );
    Ok(())
}

/// The voluntary context switches of every thread so far.
fn switches(pids: &[u32]) -> anyhow::Result<BTreeMap<String, u64>> {
    let mut switches = BTreeMap::new();
    for pid in pids {
        let process = name(&format!("/proc/{pid}"))?;
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            let folder = task?.path().display().to_string();
            let status = fs::read_to_string(format!("{folder}/status"))?;
            let count = voluntary(&status).context("a status without context switches")?;
            *switches
                .entry(format!("{process}: {}", name(&folder)?))
                .or_default() += count;
        }
    }
    Ok(switches)
}

fn voluntary(status: &str) -> Option<u64> {
    status
        .lines()
        .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?
        .trim()
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::voluntary;

    #[test]
    fn a_sleep_is_a_voluntary_switch_and_a_preemption_is_none() {
        let status =
            "Name:\tvcpu-0\nvoluntary_ctxt_switches:\t17\nnonvoluntary_ctxt_switches:\t4\n";
        assert_eq!(voluntary(status), Some(17));
        assert_eq!(voluntary("nonvoluntary_ctxt_switches:\t4\n"), None);
    }
}
