//! Fault points: in builds with debug assertions the agent, or a child of it on its way into a container, ends at the step that
//! `BULKHEAD_FAULT=<step>` on the kernel's command line names, as if it had been killed, so that tests can see what that leaves. Other
//! builds have none of it.

/// This process has come to `step`.
#[cfg(debug_assertions)]
pub fn point(step: &str) {
    // Words of its command line that the kernel doesn't know are PID 1's environment (its init/main.c, `unknown_bootoption`), and
    // children inherit that up to their exec.
    if std::env::var_os("BULKHEAD_FAULT").is_some_and(|fault| fault == step) {
        // No signal of its own kills a PID 1, the container's neither.
        // SAFETY: ends the process and touches nothing.
        unsafe { libc::_exit(128 + libc::SIGKILL) }
    }
}

/// This process has come to `step`.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn point(_step: &str) {}
