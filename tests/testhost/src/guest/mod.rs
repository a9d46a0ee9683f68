//! The emulated host's init (PID 1). It loads the modules, puts a tmpfs overlay on the machine's root as shared
//! over 9p, sets up what an ordinary host offers, and then runs commands for whoever is at the other end of the
//! virtio-serial port.

mod cgroups;
mod commands;
mod kmod;
mod mounts;

use crate::frame::{Configure, Frame, FrameError, Message, VERSION};
use commands::Commands;
use nix::sys::socket::{
    AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// Port 1 of the only virtio-serial device.
const PORT: &str = "/dev/vport0p1";
/// How often the host shows that it is alive.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// What can go wrong inside.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// A system call or file operation failed.
    #[error("{0}: {1}")]
    Step(String, io::Error),
    /// The port carries nonsense.
    #[error("port: {0}")]
    Port(#[from] FrameError),
    /// The port closed, or carried another frame than expected.
    #[error("port: no configuration came")]
    NoConfiguration,
    /// KVM answers with another API version.
    #[error("/dev/kvm has API version {0}, not 12")]
    Kvm(i32),
}

type Result<T> = std::result::Result<T, GuestError>;

/// Names the step that failed.
fn step<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> GuestError {
    move |error| GuestError::Step(what.into(), error.into())
}

/// The port's writing end; frames of several threads are written one after the other.
type Port = Arc<Mutex<File>>;

fn send(port: &Port, frame: &Frame) {
    // Nobody could be told of a failure: the port is the only way out.
    if let Ok(mut port) = port.lock() {
        let _ = frame.write_to(&mut *port);
    }
}

/// Runs as PID 1 until the machine is switched off.
pub fn init() -> ! {
    if let Err(error) = run() {
        eprintln!("testhost: init failed: {error}");
    }
    let _ = nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_AUTOBOOT);
    std::process::exit(1);
}

fn run() -> Result<()> {
    mounts::first()?;
    let uevents = uevents().map_err(step("listening for devices"))?;
    kmod::load_all(Path::new(crate::image::MODULES))?;
    let port = open_port(&uevents)?;
    let reader = port.try_clone().map_err(step(PORT))?;
    let port: Port = Arc::new(Mutex::new(port));
    let result = serve(&port, reader);
    if let Err(error) = &result {
        send(
            &port,
            &Frame::control(Message::SetupFailed(error.to_string())),
        );
    }
    result
}

fn serve(port: &Port, reader: File) -> Result<()> {
    send(port, &Frame::control(Message::Hello(VERSION)));
    let Some(Frame {
        message: Message::Configure(configure),
        ..
    }) = Frame::read_from(&reader)?
    else {
        return Err(GuestError::NoConfiguration);
    };
    set_up(&configure)?;
    let commands = Commands::new(port.clone(), configure.cgroup_v1)?;
    send(port, &Frame::control(Message::Ready(uptime_ms())));
    let beat = port.clone();
    thread::spawn(move || heartbeat(&beat));
    while let Some(frame) = Frame::read_from(&reader)? {
        match frame.message {
            Message::Shutdown => {
                mounts::unmount_binds(&configure);
                send(port, &Frame::control(Message::Bye));
            }
            Message::Ping => {}
            message => commands.handle(frame.stream, message),
        }
    }
    Ok(())
}

fn set_up(configure: &Configure) -> Result<()> {
    mounts::switch_root(configure)?;
    cgroups::set_up(configure.cgroup_v1)?;
    nix::unistd::sethostname("testhost").map_err(step("host name"))?;
    loopback_up().map_err(step("lo"))?;
    limits().map_err(step("resource limits"))?;
    // The init must outlive whatever the commands do to the memory.
    fs::write("/proc/self/oom_score_adj", "-1000").map_err(step("oom_score_adj"))?;
    for path in &configure.copies {
        mounts::copy_up(path)?;
    }
    check_kvm()
}

/// The whole point: a /dev/kvm of the API version that every user of KVM expects.
fn check_kvm() -> Result<()> {
    const KVM_GET_API_VERSION: libc::c_ulong = 0xae00;
    let kvm = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map_err(step("/dev/kvm"))?;
    // SAFETY: the request takes no argument and touches no memory of ours.
    let version = unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_GET_API_VERSION as _, 0) };
    if version != 12 {
        return Err(GuestError::Kvm(version));
    }
    Ok(())
}

fn heartbeat(port: &Port) {
    let parameter = libc::sched_param { sched_priority: 1 };
    // SAFETY: the structure lives through the call; 0 is the calling thread. A busy CPU is not a dead host.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &parameter) };
    loop {
        send(port, &Frame::control(Message::Heartbeat(uptime_ms())));
        thread::sleep(HEARTBEAT);
    }
}

fn uptime_ms() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
        .map(|time| Duration::from(time).as_millis() as u64)
        .unwrap_or(0)
}

/// Says on the console how long a step of the boot took, for those who look at its log.
fn timed<T>(what: &str, run: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let value = run();
    eprintln!("testhost: {what}: {} ms", start.elapsed().as_millis());
    value
}

/// A socket that gets the kernel's announcements of devices.
fn uevents() -> nix::Result<OwnedFd> {
    let fd = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkKObjectUEvent,
    )?;
    bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 1))?;
    Ok(fd)
}

/// Opens the port, waiting for it to be announced: it is added by a work item of the driver.
fn open_port(uevents: &OwnedFd) -> Result<File> {
    let mut buffer = [0; 8192];
    loop {
        match File::options().read(true).write(true).open(PORT) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => return other.map_err(step(PORT)),
        }
        match recv(
            uevents.as_raw_fd(),
            &mut buffer,
            nix::sys::socket::MsgFlags::empty(),
        ) {
            // An overrun loses announcements, but each one that comes later makes us look again.
            Ok(_) | Err(nix::Error::ENOBUFS | nix::Error::EINTR) => {}
            Err(errno) => return Err(step(PORT)(errno)),
        }
    }
}

fn loopback_up() -> nix::Result<()> {
    let fd = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: an all-zero ifreq is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the structure is a valid ifreq that lives through the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request) };
    nix::Error::result(result).map(drop)
}

/// What systemd gives services: engines and runtimes raise their own limits from there.
fn limits() -> nix::Result<()> {
    use nix::sys::resource::{Resource, setrlimit};
    setrlimit(Resource::RLIMIT_NOFILE, 1024, 524_288)?;
    setrlimit(Resource::RLIMIT_MEMLOCK, 8 << 20, 8 << 20)
}
