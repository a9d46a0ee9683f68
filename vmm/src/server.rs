//! The VMM's main thread: an event loop over the control socket, the VM's end and the devices without threads of their own.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use tracing::{debug, error, info, warn};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::control::{BootConfig, Event, Info, Message, Request, Response, VmState, exit_code};
use crate::end::{End, EndSignal};
use crate::fault;
use crate::machine::{BootFiles, Machine, MachineError};
use crate::socket::{self, SocketError};
use crate::sync::lock;
use crate::timeline::Timeline;

type Subscriber = Box<dyn MutEventSubscriber + Send>;

/// Why the event loop could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The control socket's descriptor is unusable.
    #[error("the control socket cannot be set up")]
    Socket(#[source] std::io::Error),
    /// The event loop failed.
    #[error("the event loop failed")]
    Loop(#[source] event_manager::Error),
}

/// The server of one VM.
pub struct Server {
    events: EventManager<Subscriber>,
    socket: Arc<OwnedFd>,
    ready: Arc<Mutex<Ready>>,
    end: Arc<EndSignal>,
    timeline: Arc<Timeline>,
    machine: Option<(Machine, BootConfig)>,
    state: VmState,
}

/// What the event loop has found to do.
#[derive(Debug, Default)]
struct Ready {
    control: bool,
    end: bool,
    template: bool,
    many_files: bool,
}

impl Server {
    /// A server on a connected control socket.
    pub fn new(socket: OwnedFd, timeline: Arc<Timeline>) -> Result<Self, ServerError> {
        nix::fcntl::fcntl(
            &socket,
            nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK),
        )
        .map_err(|errno| ServerError::Socket(errno.into()))?;
        let mut server = Self {
            events: EventManager::new_with_capacity(16).map_err(ServerError::Loop)?,
            socket: Arc::new(socket),
            ready: Arc::default(),
            end: Arc::new(EndSignal::new().map_err(ServerError::Socket)?),
            timeline,
            machine: None,
            state: VmState::Idle,
        };
        server.events.add_subscriber(Box::new(Watch {
            socket: Arc::clone(&server.socket),
            end: Arc::clone(&server.end),
            ready: Arc::clone(&server.ready),
        }));
        Ok(server)
    }

    /// Serves until the VM has ended. The machine is left as it is: the process is to exit now, which frees all of it at once.
    pub fn run(&mut self) -> Result<End, ServerError> {
        let end = loop {
            match self.events.run() {
                Ok(_) => {}
                Err(event_manager::Error::Epoll(errno)) if errno.errno() == libc::EINTR => {}
                Err(error) => return Err(ServerError::Loop(error)),
            }
            let ready = std::mem::take(&mut *lock(&self.ready));
            if ready.end
                && let Some(end) = self.end.get()
            {
                break end;
            }
            if ready.template {
                self.save_template();
            }
            if ready.many_files {
                self.tell(Event::ManyFiles);
            }
            if ready.control
                && let Some(end) = self.serve_control()
            {
                break end;
            }
        };
        self.announce(&end);
        Ok(end)
    }

    /// Answers the requests that have arrived. Returns the VM's end if one of them is it.
    fn serve_control(&mut self) -> Option<End> {
        loop {
            let answer = match socket::recv_request(&*self.socket) {
                Ok((Request::Shutdown, _)) => {
                    fault::point("vmm: shutdown requested");
                    let _ = self.answer(Response::Ok);
                    return Some(End {
                        exit_code: exit_code::POWER_OFF,
                        reason: "shut down by request".into(),
                    });
                }
                Ok((request, fds)) => self.handle(request, fds),
                Err(error) if error.is_would_block() => return None,
                Err(error @ (SocketError::Malformed(_) | SocketError::TooLong)) => {
                    Response::Error {
                        message: chain(&error),
                    }
                }
                Err(error) => return Some(orphaned(&error)),
            };
            if let Err(error) = self.answer(answer) {
                return Some(orphaned(&error));
            }
        }
    }

    fn handle(&mut self, request: Request, fds: Vec<OwnedFd>) -> Response {
        debug!("request: {request:?}, {} descriptors", fds.len());
        let result = match request {
            Request::Boot(config) => self.boot(config, fds),
            Request::Restore(config) => self.restore(config, fds),
            _ if !fds.is_empty() => Err("this request takes no descriptors".into()),
            Request::Info => Ok(Response::Info(self.info())),
            Request::Pause => self.pause(),
            Request::Resume => self.resume(),
            Request::Attach(config) => match &mut self.machine {
                None => Err(NOT_BOOTED.into()),
                Some((machine, _)) => machine
                    .attach(&config)
                    .map(|mmio_base| Response::Attached { mmio_base })
                    .map_err(|error| chain(&error)),
            },
            // Handled by the caller.
            Request::Shutdown => Ok(Response::Ok),
        };
        self.subscribe_devices();
        result.unwrap_or_else(|message| {
            error!("request failed: {message}");
            Response::Error { message }
        })
    }

    fn boot(&mut self, config: BootConfig, fds: Vec<OwnedFd>) -> Result<Response, String> {
        if self.machine.is_some() {
            return Err("the machine has been booted already".into());
        }
        let wanted = 3 + usize::from(config.serial) + usize::from(config.save_template);
        let got = fds.len();
        let mut fds = fds.into_iter();
        let (Some(kvm), Some(kernel), Some(initramfs), true) =
            (fds.next(), fds.next(), fds.next(), got == wanted)
        else {
            return Err(format!(
                "boot came with {got} descriptors and takes {wanted}"
            ));
        };
        let files = BootFiles {
            kvm,
            kernel,
            initramfs,
            serial: fds.by_ref().take(config.serial.into()).next(),
            template: fds.next(),
        };
        self.timeline.mark("boot requested");
        let timeline = Arc::clone(&self.timeline);
        let machine = Machine::new(&config, files, timeline, Arc::clone(&self.end));
        self.run_machine(machine, config)
    }

    fn restore(&mut self, config: BootConfig, fds: Vec<OwnedFd>) -> Result<Response, String> {
        if self.machine.is_some() {
            return Err("the machine has been booted already".into());
        }
        let Ok([kvm, template]) = <[OwnedFd; 2]>::try_from(fds) else {
            return Err("restore takes two descriptors".into());
        };
        self.timeline.mark("restore requested");
        let timeline = Arc::clone(&self.timeline);
        let end = Arc::clone(&self.end);
        let machine = Machine::restore(&config, kvm, template, timeline, end);
        self.run_machine(machine, config)
    }

    fn run_machine(
        &mut self,
        machine: Result<Machine, MachineError>,
        config: BootConfig,
    ) -> Result<Response, String> {
        let mut machine = machine.map_err(|error| chain(&error))?;
        machine.start().map_err(|error| chain(&error))?;
        if let Some(prepared) = machine.prepared() {
            let prepared = prepared.try_clone().map_err(|error| chain(&error))?;
            self.events.add_subscriber(Box::new(WatchTemplate {
                prepared,
                ready: Arc::clone(&self.ready),
            }));
        }
        self.machine = Some((machine, config));
        self.state = VmState::Running;
        Ok(Response::Ok)
    }

    /// Saves the template and lets the guest go on, whatever came of it. The guest stands where only a template can be of interest.
    fn save_template(&mut self) {
        let Some((machine, config)) = &mut self.machine else {
            return;
        };
        let saved = machine
            .pause()
            .and_then(|()| machine.save_template(config))
            .map_err(|error| chain(&error));
        self.timeline.mark("template saved");
        match &saved {
            Ok(()) => info!("a template is saved"),
            Err(error) => warn!("no template is saved: {error}"),
        }
        if self.state == VmState::Running {
            machine.resume();
        }
        machine.release();
        self.tell(Event::Template { error: saved.err() });
    }

    fn pause(&mut self) -> Result<Response, String> {
        let (machine, _) = self.machine.as_ref().ok_or(NOT_BOOTED)?;
        machine.pause().map_err(|error| chain(&error))?;
        self.state = VmState::Paused;
        Ok(Response::Ok)
    }

    fn resume(&mut self) -> Result<Response, String> {
        let (machine, _) = self.machine.as_ref().ok_or(NOT_BOOTED)?;
        machine.resume();
        self.state = VmState::Running;
        Ok(Response::Ok)
    }

    fn info(&self) -> Info {
        let config = self.machine.as_ref().map(|(_, config)| config);
        Info {
            pid: std::process::id(),
            state: self.state,
            vcpus: config.map_or(0, |config| config.vcpus),
            memory_mib: config.map_or(0, |config| config.memory_mib),
            timeline: self.timeline.entries(),
        }
    }

    /// Puts what new devices have to tell on the event loop.
    fn subscribe_devices(&mut self) {
        if let Some((machine, _)) = &mut self.machine {
            for subscriber in machine.take_subscribers() {
                self.events.add_subscriber(Box::new(subscriber));
            }
            for many_files in machine.take_many_files() {
                self.events.add_subscriber(Box::new(WatchFiles {
                    many_files,
                    ready: Arc::clone(&self.ready),
                }));
            }
        }
    }

    fn tell(&self, event: Event) {
        // If it can't be: the next thing that the event loop sees is that the peer is gone.
        let _ = socket::send_message(&*self.socket, &Message::Event(event));
    }

    fn answer(&self, response: Response) -> Result<(), SocketError> {
        socket::send_message(&*self.socket, &Message::Response(response))
    }

    /// Tells log and server how the VM ended.
    fn announce(&mut self, end: &End) {
        // What the guest wrote to its console last is still in the queue.
        let _ = self.events.run_with_timeout(0);
        fault::point("vmm: ended");
        let timeline = self.timeline.entries();
        debug!("timeline: {}", self.timeline.summary());
        if matches!(end.exit_code, exit_code::CRASH | exit_code::SETUP) {
            error!("the VM ended: {}", end.reason);
        } else {
            info!("the VM ended: {}", end.reason);
        }
        let event = Event::Ended {
            exit_code: end.exit_code,
            reason: end.reason.clone(),
            timeline,
        };
        // The peer may be gone: that is what some ends are about.
        let _ = socket::send_message(&*self.socket, &Message::Event(event));
    }
}

const NOT_BOOTED: &str = "the machine has not been booted";

/// Notes for [`Server::run`] that the guest stands where a template is to be saved.
struct WatchTemplate {
    prepared: EventFd,
    ready: Arc<Mutex<Ready>>,
}

impl MutEventSubscriber for WatchTemplate {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.prepared, EventSet::IN)) {
            error!("cannot watch for the guest's preparation: {error}");
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        lock(&self.ready).template = true;
        // It comes once.
        let _ = ops.remove(events);
    }
}

/// Notes for [`Server::run`] that the guest holds many of a share's files.
struct WatchFiles {
    many_files: EventFd,
    ready: Arc<Mutex<Ready>>,
}

impl MutEventSubscriber for WatchFiles {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.many_files, EventSet::IN)) {
            error!("cannot watch the guest's files: {error}");
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        // Fails only if there was nothing to read.
        let _ = self.many_files.read();
        lock(&self.ready).many_files = true;
    }
}

/// Watches the control socket and the end, and notes what is ready for [`Server::run`].
struct Watch {
    socket: Arc<OwnedFd>,
    end: Arc<EndSignal>,
    ready: Arc<Mutex<Ready>>,
}

impl MutEventSubscriber for Watch {
    fn init(&mut self, ops: &mut EventOps) {
        for events in [
            Events::new(&*self.socket, EventSet::IN),
            Events::new(self.end.event(), EventSet::IN),
        ] {
            if let Err(error) = ops.add(events) {
                error!("cannot watch the control socket: {error}");
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        let mut ready = lock(&self.ready);
        if events.fd() == self.socket.as_raw_fd() {
            ready.control = true;
        } else {
            ready.end = true;
        }
    }
}

fn orphaned(error: &SocketError) -> End {
    End {
        exit_code: exit_code::ORPHANED,
        reason: format!("the VMM lost its server: {}", chain(error)),
    }
}

/// One line for an error and its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    line
}
