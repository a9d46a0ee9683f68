//! The agent at work: the control connection, the stream connections, the reaper; until the host goes or says so.

use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::agent_ttrpc::create_agent;
use tokio::sync::{Notify, Semaphore};
use ttrpc::r#async::{Server, transport};

use crate::container::{Containers, Ground};
use crate::reaper::Reaper;
use crate::service::Service;
use crate::streams::read_header;
use crate::timeline::Timeline;
use crate::transport::{Connection, Control, Listener};

/// Connections that have not sent their header yet, at most; more wait to be accepted.
const UNNAMED_CONNECTIONS: usize = 64;

/// How long a connection may take to say which stream it is.
const HEADER_TIME: Duration = Duration::from_secs(10);

/// Pause after a connection could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long the host may take to read the last answer before the machine goes off.
const FAREWELL_TIME: Duration = Duration::from_millis(100);

/// How long the processes of all containers may take to die.
const KILL_TIME: Duration = Duration::from_secs(5);

/// Serves until the control connection ends or the host has shut the guest down; no container is left then.
pub async fn serve(
    control: Connection,
    streams: Listener,
    ground: Ground,
    mut timeline: Timeline,
) -> anyhow::Result<()> {
    // Children are this image until they execute a program; containers may see some of them. They inherit this.
    if let Err(errno) = nix::sys::prctl::set_dumpable(false) {
        tracing::warn!(%errno, "cannot hide the agent's memory");
    }
    let reaper = Reaper::default();
    let containers = Arc::new(Containers::new(reaper.clone(), ground));
    let reaping = tokio::spawn(reaper.run());
    tokio::spawn(accept_streams(streams, Arc::clone(&containers)));

    let ended = Arc::new(Notify::new());
    let shutdown = Arc::new(Notify::new());
    timeline.mark("serving");
    let service = Service::new(Arc::clone(&containers), timeline, Arc::clone(&shutdown));
    let control = Control::new(control, Arc::clone(&ended));
    let only = futures::stream::once(std::future::ready(Ok(control)));
    let mut server = Server::new()
        .add_listener(transport::Listener::new(only))
        .register_service(create_agent(Arc::new(service)));
    server.start().await?;

    tokio::select! {
        () = ended.notified() => tracing::info!("the host is gone"),
        () = shutdown.notified() => {
            tracing::info!("shut down");
            let _ = tokio::time::timeout(FAREWELL_TIME, ended.notified()).await;
        }
        reaped = reaping => {
            tracing::error!(?reaped, "the reaper ended");
        }
    }
    if tokio::time::timeout(KILL_TIME, containers.end_all())
        .await
        .is_err()
    {
        tracing::warn!("some processes did not die");
    }
    Ok(())
}

async fn accept_streams(listener: Listener, containers: Arc<Containers>) {
    let unnamed = Arc::new(Semaphore::new(UNNAMED_CONNECTIONS));
    loop {
        // Fails only once the semaphore is closed, which nobody does.
        let Ok(permit) = Arc::clone(&unnamed).acquire_owned().await else {
            return;
        };
        let connection = match listener.accept().await {
            Ok(connection) => connection,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionAborted => continue,
            Err(error) => {
                // Out of descriptors or memory: the connection stays in the queue, so give others time to end.
                tracing::error!(%error, "cannot accept a stream");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let containers = Arc::clone(&containers);
        tokio::spawn(async move {
            if let Err(problem) = place_stream(connection, &containers).await {
                tracing::warn!(problem, "closed a stream connection");
            }
            drop(permit);
        });
    }
}

async fn place_stream(mut connection: Connection, containers: &Containers) -> Result<(), String> {
    let header = tokio::time::timeout(HEADER_TIME, read_header(&mut connection))
        .await
        .map_err(|_| "its header did not come".to_owned())?
        .map_err(|error| format!("its header {error}"))?;
    containers
        .attach(&header, connection)
        .map_err(|error| error.to_string())
}
