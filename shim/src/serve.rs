//! A server's life: from the inherited listener to the removal of everything that there was of its sandbox.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use anyhow::Context;
use bulkhead_protocol::agent_ttrpc::create_agent;
use bulkhead_runtime::config::Config;
use bulkhead_runtime::hooks::RuntimePlace;
use bulkhead_runtime::launch::{self, ServerArgs};
use bulkhead_runtime::oom;
use bulkhead_runtime::sandbox::{Params, Sandbox};
use bulkhead_runtime::share;
use bulkhead_runtime::state::StateDir;
use bulkhead_runtime::timeline::{Record, Timeline};
use containerd_shim_protos::shim_async::create_task;
use nix::sys::signal::SigSet;
use tokio::net::unix::pipe;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use ttrpc::asynchronous::transport::Listener;
use ttrpc::asynchronous::{Server, Service};

use crate::logging;
use crate::service::TaskService;

/// The service's name in the protocol crate (containerd 2), and the older one with the same messages (containerd 1).
const TASK_V3: &str = "containerd.task.v3.Task";
const TASK_V2: &str = "containerd.task.v2.Task";

/// Runs a server until its sandbox is gone.
pub fn serve(args: ServerArgs) -> anyhow::Result<()> {
    let timeline = Timeline::default();
    timeline.mark("server: started");
    // A Ctrl-C in the client's terminal is for the client. A process that leads a group already may stay in it.
    let _ = nix::unistd::setsid();
    // A client that passes signals on has them blocked, and children begin with what is.
    SigSet::empty()
        .thread_set_mask()
        .context("cannot unblock signals")?;
    let take = |fd| launch::inherited(fd).context("a descriptor is not what the arguments say");
    let listener = UnixListener::from(take(args.listener_fd)?);
    let lifeline = args.lifeline_fd.map(take).transpose()?;
    let timeline_fd = args.timeline_fd.map(take).transpose()?;

    let state = StateDir::of(&args.root, &args.id);
    let result = Config::load(args.config.as_deref())
        .map_err(anyhow::Error::from)
        .and_then(|mut config| {
            config.debug |= args.debug;
            logging::start(&config, &args.id)?;
            oom::protect();
            let host = RuntimePlace::current().context("cannot see the host's namespaces")?;
            share::private_mount_namespace().context("cannot make a mount namespace")?;
            // What is in the state directory is bound and dialled by its short name.
            std::env::set_current_dir(state.path()).context("cannot enter the state directory")?;
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?
                .block_on(async {
                    let params = Params {
                        id: args.id,
                        state: state.clone(),
                        config,
                        host,
                    };
                    let sandbox = Sandbox::new(params, timeline);
                    run(sandbox, listener, lifeline, timeline_fd).await
                })
        });
    if result.is_err() {
        // It comes before there is anything of the sandbox.
        let _ = state.remove();
    }
    result
}

async fn run(
    sandbox: Arc<Sandbox>,
    listener: UnixListener,
    lifeline: Option<OwnedFd>,
    timeline_fd: Option<OwnedFd>,
) -> anyhow::Result<()> {
    let shutdown = Arc::new(Notify::new());
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let service = Arc::new(TaskService::new(sandbox.clone(), shutdown.clone()));
    let mut server = Server::new()
        .add_listener(Listener::try_from(listener)?)
        .register_service(both_versions(service));
    server.start().await?;

    let cut = cut(lifeline);
    tokio::pin!(cut);
    let mut terminated = false;
    let why = loop {
        tokio::select! {
            // A client that has asked may be gone before this is seen.
            biased;
            () = shutdown.notified() => break "asked to",
            () = &mut cut => {
                sandbox.kill();
                break "the client is gone";
            }
            _ = terminate.recv() => {
                if terminated {
                    break "SIGTERM once more";
                }
                terminated = true;
                tracing::debug!("SIGTERM: the containers are to end; another ends them at once");
            }
            _ = interrupt.recv() => break "SIGINT",
            () = sandbox.stop(), if terminated => break "the containers have ended after SIGTERM",
        }
    };
    tracing::debug!(why, "the server ends");
    let ended = sandbox.shutdown();
    tokio::pin!(ended);
    loop {
        tokio::select! {
            () = &mut ended => break,
            // Hooks may take their time otherwise.
            _ = terminate.recv() => sandbox.hurry_hooks(),
            _ = interrupt.recv() => sandbox.hurry_hooks(),
        }
    }
    let record = sandbox.timeline().record();
    for moment in &record.entries {
        tracing::debug!(at_ns = moment.at_ns, name = moment.name, "timeline");
    }
    if let Some(fd) = timeline_fd
        && let Err(error) = tell(&record, fd)
    {
        tracing::debug!(%error, "the client does not take the timeline");
    }
    Ok(())
}

fn tell(timeline: &Record, fd: OwnedFd) -> anyhow::Result<()> {
    Ok(File::from(fd).write_all(&serde_json::to_vec(timeline)?)?)
}

/// The Task API under both of its names, and what it lacks.
fn both_versions(service: Arc<TaskService>) -> std::collections::HashMap<String, Service> {
    let mut services = create_agent(service.clone());
    services.extend(create_task(service.clone()));
    for (name, older) in create_task(service) {
        services.insert(name.replace(TASK_V3, TASK_V2), older);
    }
    services
}

/// Returns when the other end of the lifeline is closed; never without one, or once the client has written to it, which
/// says that the sandbox is to outlive it.
async fn cut(lifeline: Option<OwnedFd>) {
    if let Some(lifeline) = lifeline.and_then(|fd| pipe::Receiver::from_owned_fd(fd).ok()) {
        let mut byte = [0];
        loop {
            let _ = lifeline.readable().await;
            match lifeline.try_read(&mut byte) {
                Ok(1..) => break,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                _ => return,
            }
        }
    }
    std::future::pending().await
}
