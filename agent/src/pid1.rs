//! The life of PID 1, in order.

use anyhow::Context;
use bulkhead_protocol::{
    BOOT_MARK_INIT, BOOT_MARK_PREPARED, BOOT_MARK_READY, CONTROL_PORT, STEP_PREPARED, STREAM_PORT,
};
use nix::sys::signal::{SigHandler, Signal, signal};

use crate::container::Ground;
use crate::power::{self, Ports};
use crate::timeline::Timeline;
use crate::transport::{Connection, Listener};
use crate::{boot, serve};

/// Boots, serves, powers off.
pub fn run() -> ! {
    // Anywhere else this would mount over a machine's root and restart it.
    if std::process::id() != 1 {
        eprintln!(
            "bulkhead-agent: is PID 1 of a guest and does nothing elsewhere; use `bulkhead run`"
        );
        std::process::exit(1);
    }
    if let Err(error) = live() {
        // The log may not have begun.
        eprintln!("bulkhead-agent: {error:#}");
    }
    boot::write_back();
    power::off()
}

fn live() -> anyhow::Result<()> {
    let ports = Ports::open();
    if let Some(ports) = &ports {
        ports.mark(BOOT_MARK_INIT);
    }
    let mut timeline = Timeline::default();
    timeline.mark("init");
    boot::enter_root(&mut timeline)?;
    boot::open_console()?;
    boot::start_log();
    // SAFETY: ignoring a signal installs no handler.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigIgn) }.context("cannot ignore SIGPIPE")?;
    let hierarchy = boot::prepare_for_containers(&mut timeline)?;

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .context("cannot make the runtime")?;
    runtime.block_on(async {
        let streams = Listener::bind_vsock(STREAM_PORT).context("cannot listen on vsock")?;
        let network = boot::make_ahead(&hierarchy);
        let share = boot::mount_share(&mut timeline);
        timeline.mark(STEP_PREPARED);
        // Guests that are made from a template begin behind this. One that lacks its share is no example for others.
        if let Some(ports) = ports.as_ref().filter(|_| share) {
            ports.mark(BOOT_MARK_PREPARED);
        }
        let ground = Ground {
            hierarchy,
            share,
            network,
        };
        timeline.mark("dialling");
        if let Some(ports) = ports {
            ports.mark(BOOT_MARK_READY);
            // Dropped here: children would inherit the permission.
        }
        let control = Connection::dial_host(CONTROL_PORT)
            .await
            .context("cannot reach the host over vsock")?;
        serve::serve(control, streams, ground, timeline).await
    })
}
