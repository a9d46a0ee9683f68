//! The ttrpc service: requests in, answers or typed errors out. What it does is done elsewhere.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use bulkhead_protocol::PROTOCOL_VERSION;
use bulkhead_protocol::agent::{
    BindDeviceRequest, BindDeviceResponse, ContainerStatsRequest, ContainerStatsResponse,
    CreateContainerRequest, CreateContainerResponse, DeleteContainerRequest,
    DeleteContainerResponse, DeleteProcessRequest, DeleteProcessResponse, ExecProcessRequest,
    ExecProcessResponse, ForgetFilesRequest, ForgetFilesResponse, HelloRequest, HelloResponse,
    ListProcessesRequest, ListProcessesResponse, PauseContainerRequest, PauseContainerResponse,
    ResizeTerminalRequest, ResizeTerminalResponse, ResumeContainerRequest, ResumeContainerResponse,
    ShutdownRequest, ShutdownResponse, SignalProcessRequest, SignalProcessResponse,
    StartContainerRequest, StartContainerResponse, TimelineEntry, UpdateContainerRequest,
    UpdateContainerResponse, WaitOomRequest, WaitOomResponse, WaitProcessRequest,
    WaitProcessResponse,
};
use bulkhead_protocol::agent_ttrpc::Agent;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use tokio::sync::Notify;
use ttrpc::r#async::TtrpcContext;

use crate::container::Containers;
use crate::entropy;
use crate::error::{Context, Error, Kind, Result};
use crate::fault;
use crate::hotplug;
use crate::terminal::Size;
use crate::timeline::{Timeline, nanoseconds};

/// The agent's side of the API.
#[derive(Debug)]
pub struct Service {
    containers: Arc<Containers>,
    timeline: Timeline,
    greeted: AtomicBool,
    shutdown: Arc<Notify>,
}

impl Service {
    /// `shutdown` is notified when the host has asked for the end and everything is stopped.
    pub fn new(containers: Arc<Containers>, timeline: Timeline, shutdown: Arc<Notify>) -> Self {
        Self {
            containers,
            timeline,
            greeted: AtomicBool::new(false),
            shutdown,
        }
    }

    fn greeted(&self) -> Result<&Arc<Containers>> {
        if self.greeted.load(Ordering::Relaxed) {
            Ok(&self.containers)
        } else {
            Err(Error::State(format!(
                "the agent speaks protocol version {PROTOCOL_VERSION}, and no Hello of that version came first"
            )))
        }
    }
}

#[async_trait]
impl Agent for Service {
    async fn hello(&self, _: &TtrpcContext, request: HelloRequest) -> ttrpc::Result<HelloResponse> {
        let theirs = request.protocol_version;
        if theirs != PROTOCOL_VERSION {
            return Err(Error::State(format!(
                "the host speaks protocol version {theirs} (Bulkhead {}), the agent {PROTOCOL_VERSION} (Bulkhead {})",
                request.host_version,
                env!("CARGO_PKG_VERSION")
            ))
            .into());
        }
        if !request.seed.is_empty() {
            seed(&request.seed)?;
        }
        set_clock(request.wall_clock_ns);
        self.greeted.store(true, Ordering::Relaxed);
        let timeline = self
            .timeline
            .steps()
            .iter()
            .map(|&(name, at_ns)| TimelineEntry {
                name: name.to_owned(),
                at_ns,
                ..Default::default()
            });
        Ok(HelloResponse {
            protocol_version: PROTOCOL_VERSION,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: kernel_release(),
            timeline: timeline.collect(),
            ..Default::default()
        })
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        let containers = Arc::clone(self.greeted()?);
        let pid = whole(async move { containers.create(&request).await }).await?;
        Ok(CreateContainerResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        request: StartContainerRequest,
    ) -> ttrpc::Result<StartContainerResponse> {
        let containers = Arc::clone(self.greeted()?);
        whole(async move { containers.start(&request.container_id).await }).await?;
        Ok(StartContainerResponse::default())
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: ExecProcessRequest,
    ) -> ttrpc::Result<ExecProcessResponse> {
        let containers = Arc::clone(self.greeted()?);
        let pid = whole(async move { containers.exec(&request).await }).await?;
        Ok(ExecProcessResponse {
            pid,
            ..Default::default()
        })
    }

    async fn delete_process(
        &self,
        _: &TtrpcContext,
        request: DeleteProcessRequest,
    ) -> ttrpc::Result<DeleteProcessResponse> {
        self.greeted()?
            .delete_process(&request.container_id, &request.exec_id)?;
        Ok(DeleteProcessResponse::default())
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: ResizeTerminalRequest,
    ) -> ttrpc::Result<ResizeTerminalResponse> {
        let bounded = |name: &str, value: u32| {
            u16::try_from(value)
                .map_err(|_| Error::Request(format!("{name}: {value} is more than {}", u16::MAX)))
        };
        let size = Size {
            columns: bounded("width", request.width)?,
            rows: bounded("height", request.height)?,
        };
        self.greeted()?
            .resize(&request.container_id, &request.exec_id, size)?;
        Ok(ResizeTerminalResponse::default())
    }

    async fn pause_container(
        &self,
        _: &TtrpcContext,
        request: PauseContainerRequest,
    ) -> ttrpc::Result<PauseContainerResponse> {
        let container = self.greeted()?.find(&request.container_id)?;
        whole(async move { container.pause().await }).await?;
        Ok(PauseContainerResponse::default())
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        request: ResumeContainerRequest,
    ) -> ttrpc::Result<ResumeContainerResponse> {
        let container = self.greeted()?.find(&request.container_id)?;
        whole(async move { container.resume().await }).await?;
        Ok(ResumeContainerResponse::default())
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: UpdateContainerRequest,
    ) -> ttrpc::Result<UpdateContainerResponse> {
        self.greeted()?
            .find(&request.container_id)?
            .update(&request.resources_json)
            .await?;
        Ok(UpdateContainerResponse::default())
    }

    async fn container_stats(
        &self,
        _: &TtrpcContext,
        request: ContainerStatsRequest,
    ) -> ttrpc::Result<ContainerStatsResponse> {
        Ok(self.greeted()?.find(&request.container_id)?.stats()?)
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: ListProcessesRequest,
    ) -> ttrpc::Result<ListProcessesResponse> {
        Ok(ListProcessesResponse {
            processes: self.greeted()?.find(&request.container_id)?.processes()?,
            ..Default::default()
        })
    }

    async fn wait_oom(
        &self,
        _: &TtrpcContext,
        request: WaitOomRequest,
    ) -> ttrpc::Result<WaitOomResponse> {
        let container = self.greeted()?.find(&request.container_id)?;
        Ok(WaitOomResponse {
            kills: container.oom_kills(request.seen).await?,
            ..Default::default()
        })
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: SignalProcessRequest,
    ) -> ttrpc::Result<SignalProcessResponse> {
        let SignalProcessRequest {
            container_id,
            exec_id,
            signal,
            all,
            ..
        } = request;
        let containers = Arc::clone(self.greeted()?);
        whole(async move {
            containers
                .signal(&container_id, &exec_id, signal, all)
                .await
        })
        .await?;
        Ok(SignalProcessResponse::default())
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: WaitProcessRequest,
    ) -> ttrpc::Result<WaitProcessResponse> {
        let exit = self
            .greeted()?
            .wait(&request.container_id, &request.exec_id)
            .await?;
        Ok(WaitProcessResponse {
            exit_code: exit.code,
            exited_at_ns: exit.at_ns,
            ..Default::default()
        })
    }

    async fn delete_container(
        &self,
        _: &TtrpcContext,
        request: DeleteContainerRequest,
    ) -> ttrpc::Result<DeleteContainerResponse> {
        let containers = Arc::clone(self.greeted()?);
        whole(async move { containers.delete(&request.container_id).await }).await?;
        Ok(DeleteContainerResponse::default())
    }

    async fn forget_files(
        &self,
        _: &TtrpcContext,
        _: ForgetFilesRequest,
    ) -> ttrpc::Result<ForgetFilesResponse> {
        let containers = Arc::clone(self.greeted()?);
        whole(async move { containers.forget_unused_files().await }).await?;
        Ok(ForgetFilesResponse::default())
    }

    async fn bind_device(
        &self,
        _: &TtrpcContext,
        request: BindDeviceRequest,
    ) -> ttrpc::Result<BindDeviceResponse> {
        self.greeted()?;
        Ok(BindDeviceResponse {
            virtio_name: hotplug::bind(request.mmio_base)?,
            ..Default::default()
        })
    }

    async fn shutdown(
        &self,
        _: &TtrpcContext,
        _: ShutdownRequest,
    ) -> ttrpc::Result<ShutdownResponse> {
        let containers = Arc::clone(self.greeted()?);
        fault::point("shutdown-asked");
        whole(async move {
            containers.end_all().await;
            Ok(())
        })
        .await?;
        fault::point("shutdown-killed");
        crate::boot::write_back();
        fault::point("shutdown-released");
        self.shutdown.notify_one();
        Ok(ShutdownResponse::default())
    }
}

/// Runs something to its end even if the caller goes away: half a container would be nobody's.
async fn whole<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    tokio::spawn(work).await.unwrap_or_else(|_| {
        Err(Error::setup(
            Kind::Internal,
            "the agent failed; its console says why",
        ))
    })
}

/// A guest whose generator can't be seeded may draw the numbers of others: it is refused.
fn seed(bytes: &[u8]) -> Result<()> {
    let seed = bytes.try_into().map_err(|_| {
        Error::Request(format!(
            "seed: {} bytes, not {}",
            bytes.len(),
            bulkhead_protocol::SEED_LENGTH
        ))
    })?;
    entropy::seed(seed).what(|| "the generator of random numbers")
}

/// Sets the wall clock if it is off by more than a second.
fn set_clock(host_ns: u64) {
    const SECOND: u64 = 1_000_000_000;
    if host_ns == 0 || nanoseconds(ClockId::CLOCK_REALTIME).abs_diff(host_ns) <= SECOND {
        return;
    }
    let (Ok(seconds), Ok(fraction)) = (
        i64::try_from(host_ns / SECOND),
        i64::try_from(host_ns % SECOND),
    ) else {
        return;
    };
    if let Err(errno) = clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::new(seconds, fraction)) {
        tracing::warn!(%errno, "cannot set the clock");
    }
}

fn kernel_release() -> String {
    nix::sys::utsname::uname()
        .map(|names| names.release().to_string_lossy().into_owned())
        .unwrap_or_default()
}
