//! How often an idle sandbox wakes up: each time costs the host power and a busy neighbour his cache.

use std::thread::sleep;
use std::time::Duration;

use bulkhead_e2e::processes::sleeps;

use crate::idle::IdleSandbox;
use crate::table::print;

/// How long a sandbox is let alone before it counts as idle: what a boot left to be done later is done then.
pub const SETTLE: Duration = Duration::from_secs(20);

/// How long it is watched.
pub const WATCH: Duration = Duration::from_secs(60);

/// Prints how often each thread of an idle sandbox went to sleep again within a minute. A vCPU sleeps when its guest halts.
pub fn measure() -> anyhow::Result<()> {
    let sandbox = IdleSandbox::start()?;
    sleep(SETTLE);
    let before = sleeps(&sandbox.pids)?;
    sleep(WATCH);
    let after = sleeps(&sandbox.pids)?;
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
