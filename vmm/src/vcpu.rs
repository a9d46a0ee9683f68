//! One vCPU: its registers at boot, its thread's loop, and what its exits mean.
//!
//! Threads are stopped by a signal (SIGRTMIN) and KVM's `immediate_exit`: the one who wants a vCPU to stop sets the
//! flag first, so a thread on its way into KVM_RUN comes out at once, and one inside is kicked out by the signal. A thread parks only on
//! that EINTR, when KVM has completed the instruction it was exiting for.

use std::fmt::Write as _;
use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use tracing::debug;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler, unblock_signal};

use crate::boot;
use crate::bus::{Bus, Outcome};
use crate::control::exit_code;
use crate::cpuid;
use crate::end::EndSignal;
use crate::sync::lock;
use crate::thread::{self, Kind};
use crate::timeline::Timeline;
use crate::vcpu_state::{StateError, VcpuState};

/// Most vCPUs of a machine.
pub const MAX_VCPUS: u8 = 32;

/// How long all vCPUs may take to stand still. A vCPU leaves guest code in microseconds; only a device's reset can hold it longer.
const STOP_LIMIT: Duration = Duration::from_secs(10);

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on (bit 11), memory is write-back (6) where none says otherwise.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// Why a vCPU could not be set up or stopped.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// An ioctl failed.
    #[error("vCPU {vcpu}: {operation} failed")]
    Kvm {
        /// Which vCPU.
        vcpu: u8,
        /// Which operation.
        operation: &'static str,
        /// Cause.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM took fewer MSRs than given.
    #[error("vCPU {0}: KVM refused an MSR")]
    Msr(u8),
    /// Its state could not be saved or restored.
    #[error("vCPU {vcpu}")]
    State {
        /// Which vCPU.
        vcpu: u8,
        /// Cause.
        #[source]
        source: StateError,
    },
    /// More CPUID entries than KVM takes.
    #[error("too many CPUID entries")]
    Cpuid,
    /// A thread could not be started.
    #[error("vCPU {vcpu}: cannot start its thread")]
    Thread {
        /// Which vCPU.
        vcpu: u8,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The kick signal could not be set up.
    #[error("cannot set up the signal that stops vCPUs")]
    Signal(#[source] io::Error),
    /// A vCPU did not stop.
    #[error("{0} of the vCPUs did not stop within {STOP_LIMIT:?}")]
    Stuck(usize),
}

/// Creates vCPU `id`.
pub fn create(vm: &VmFd, id: u8) -> Result<VcpuFd, VcpuError> {
    vm.create_vcpu(id.into()).map_err(|source| VcpuError::Kvm {
        vcpu: id,
        operation: "creating the vCPU",
        source,
    })
}

/// Gives vCPU `id` its CPUID (made of [`cpuid::common`]) and MSRs.
pub fn configure(fd: &VcpuFd, id: u8, cpuid: &[kvm_cpuid_entry2]) -> Result<(), VcpuError> {
    let kvm = |operation| {
        move |source| VcpuError::Kvm {
            vcpu: id,
            operation,
            source,
        }
    };
    let entries = cpuid::for_vcpu(cpuid, id);
    if entries.len() > KVM_MAX_CPUID_ENTRIES {
        return Err(VcpuError::Cpuid);
    }
    let entries = CpuId::from_entries(&entries).map_err(|_| VcpuError::Cpuid)?;
    fd.set_cpuid2(&entries).map_err(kvm("setting CPUID"))?;

    // Everything else is right after reset. The local APIC's LINT pins too: KVM sets the boot vCPU's LINT0 to ExtINT, and
    // Linux programs both itself.
    let msr = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let msrs = [
        msr(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRINGS),
        msr(MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
    ];
    let count = msrs.len();
    let msrs = Msrs::from_entries(&msrs).map_err(|_| VcpuError::Msr(id))?;
    if fd.set_msrs(&msrs).map_err(kvm("setting MSRs"))? != count {
        return Err(VcpuError::Msr(id));
    }
    Ok(())
}

/// Puts the boot vCPU at the kernel's entry. The others wait for the kernel's start-up IPI.
pub fn set_entry(fd: &VcpuFd, entry: u64) -> Result<(), VcpuError> {
    let kvm = |operation| {
        move |source| VcpuError::Kvm {
            vcpu: 0,
            operation,
            source,
        }
    };
    let mut sregs = fd
        .get_sregs()
        .map_err(kvm("reading the system registers"))?;
    boot::set_long_mode(&mut sregs);
    fd.set_sregs(&sregs)
        .map_err(kvm("setting the system registers"))?;
    fd.set_regs(&boot::entry_registers(entry))
        .map_err(kvm("setting the registers"))
}

/// What the vCPUs are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Run,
    Pause,
    Stop,
}

/// What the owner wants of the threads, and what they have done.
struct State {
    target: Target,
    /// Whether they are to stand still for a template, whatever the target.
    held: bool,
    /// The MSRs to save of each vCPU that stands still.
    save: Option<Arc<[u32]>>,
    /// Of each thread, whether it stands still.
    parked: Vec<bool>,
    /// Of each thread, what it has saved.
    saved: Vec<Option<Result<VcpuState, StateError>>>,
}

/// Shared between the threads of a set and its owner.
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Told when the guest is where a template is to be saved; taken by the first to come there.
    prepared: Mutex<Option<EventFd>>,
    bus: Arc<Bus>,
    end: Arc<EndSignal>,
    timeline: Arc<Timeline>,
}

/// The vCPU threads of a machine.
pub struct VcpuSet {
    shared: Arc<Shared>,
    threads: Vec<(Kick, JoinHandle<VcpuFd>)>,
}

/// The `immediate_exit` byte of a vCPU's `kvm_run`.
pub(crate) struct Kick(*const AtomicU8);

// SAFETY: the byte is only accessed atomically, and lives as long as the VcpuFd, which its thread gives back at its end to the one
// who has the `Kick`.
unsafe impl Send for Kick {}
// SAFETY: as above.
unsafe impl Sync for Kick {}

impl Kick {
    pub(crate) fn new(fd: &mut VcpuFd) -> Self {
        let flag: *mut u8 = &mut fd.get_kvm_run().immediate_exit;
        Self(flag.cast_const().cast())
    }

    pub(crate) fn set(&self, value: u8) {
        // SAFETY: see the `Send` implementation; an AtomicU8 has the layout of the u8 that the kernel reads.
        unsafe { (*self.0).store(value, Ordering::SeqCst) }
    }
}

impl VcpuSet {
    /// Starts a thread for each vCPU; they run at once. With `prepared` they stop when the guest says that it is prepared, that event is
    /// given, and [`Self::release`] lets them go on.
    pub fn start(
        vcpus: Vec<VcpuFd>,
        bus: Arc<Bus>,
        end: Arc<EndSignal>,
        timeline: Arc<Timeline>,
        prepared: Option<EventFd>,
    ) -> Result<Self, VcpuError> {
        install_kick_handler()?;
        let mut set = Self {
            shared: Arc::new(Shared {
                state: Mutex::new(State {
                    target: Target::Run,
                    held: false,
                    save: None,
                    parked: vec![false; vcpus.len()],
                    saved: vcpus.iter().map(|_| None).collect(),
                }),
                changed: Condvar::new(),
                prepared: Mutex::new(prepared),
                bus,
                end,
                timeline,
            }),
            threads: Vec::with_capacity(vcpus.len()),
        };
        for (id, mut fd) in vcpus.into_iter().enumerate() {
            let kick = Kick::new(&mut fd);
            let own_kick = Kick::new(&mut fd);
            let id = id as u8;
            let vcpu = Vcpu {
                id,
                fd,
                kick: own_kick,
                shared: Arc::clone(&set.shared),
                exits: Exits::default(),
            };
            let thread = thread::spawn(Kind::Vcpu(id), move || vcpu.run())
                .map_err(|source| VcpuError::Thread { vcpu: id, source })?;
            set.threads.push((kick, thread));
        }
        Ok(set)
    }

    /// Stops every vCPU where it is. Returns when all stand still.
    pub fn pause(&self) -> Result<(), VcpuError> {
        let result = self.set_target(Target::Pause);
        if result.is_err() {
            // All or none.
            self.resume();
        }
        result
    }

    /// Lets the vCPUs run again.
    pub fn resume(&self) {
        lock(&self.shared.state).target = Target::Run;
        self.shared.changed.notify_all();
    }

    /// What each vCPU is at, with these MSRs. They must stand still, and go on doing so.
    pub fn save(&self, msrs: &[u32]) -> Result<Vec<VcpuState>, VcpuError> {
        lock(&self.shared.state).save = Some(msrs.into());
        self.shared.changed.notify_all();
        let mut state = self.wait_for_all(|state, id| state.saved[id].is_some())?;
        state.save = None;
        let saved = state.saved.iter_mut().map(Option::take).enumerate();
        let saved: Result<Vec<_>, _> = saved
            .filter_map(|(id, saved)| Some((id as u8, saved?)))
            .map(|(vcpu, saved)| saved.map_err(|source| VcpuError::State { vcpu, source }))
            .collect();
        saved
    }

    /// Lets vCPUs go on that stand where a template was to be saved.
    pub fn release(&self) {
        lock(&self.shared.state).held = false;
        self.shared.changed.notify_all();
    }

    fn set_target(&self, target: Target) -> Result<(), VcpuError> {
        let mut state = lock(&self.shared.state);
        state.target = target;
        self.shared.changed.notify_all();
        for (kick, thread) in &self.threads {
            kick.set(1);
            // Fails only for a thread that has ended, which stands still.
            let _ = thread.kill(SIGRTMIN());
        }
        drop(state);
        self.wait_for_all(|state, id| state.parked[id]).map(drop)
    }

    /// Waits until something is true of every vCPU.
    fn wait_for_all(
        &self,
        is_done: impl Fn(&State, usize) -> bool,
    ) -> Result<MutexGuard<'_, State>, VcpuError> {
        let mut state = lock(&self.shared.state);
        let limit = Instant::now() + STOP_LIMIT;
        loop {
            let running = (0..self.threads.len())
                .filter(|id| !is_done(&state, *id))
                .count();
            let left = limit.saturating_duration_since(Instant::now());
            if running == 0 {
                return Ok(state);
            }
            if left.is_zero() {
                return Err(VcpuError::Stuck(running));
            }
            state = match self.shared.changed.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }
}

impl Drop for VcpuSet {
    fn drop(&mut self) {
        if let Err(error) = self.set_target(Target::Stop) {
            // Its VcpuFd must outlive it: leak both rather than wait for ever.
            debug!("{error}");
            return;
        }
        for (_, thread) in self.threads.drain(..) {
            // A panic was reported by the panic hook; nothing is left to do here.
            let _ = thread.join();
        }
    }
}

/// What made one vCPU leave the guest, for the log.
#[derive(Debug, Default)]
struct Exits {
    port_reads: u64,
    port_writes: u64,
    mmio_reads: u64,
    mmio_writes: u64,
}

struct Vcpu {
    id: u8,
    fd: VcpuFd,
    kick: Kick,
    shared: Arc<Shared>,
    exits: Exits,
}

/// What to do after an exit.
enum Next {
    Run,
    Park,
    End(i32, String),
    Crash(String),
}

impl Vcpu {
    /// The thread: runs the guest until it ends or the set is dropped.
    fn run(mut self) -> VcpuFd {
        // Threads inherit their creator's mask.
        if let Err(error) = unblock_signal(SIGRTMIN()) {
            debug!(
                "vcpu {}: cannot unblock the kick signal: {error:?}",
                self.id
            );
        }
        if self.id == 0 {
            self.shared.timeline.mark("first KVM_RUN");
        }
        loop {
            match self.step() {
                Next::Run => {}
                Next::Park => {
                    if self.park() == Target::Stop {
                        break;
                    }
                }
                Next::End(code, reason) => {
                    self.shared.bus.flush();
                    self.shared.end.report(code, reason);
                    break;
                }
                Next::Crash(what) => {
                    self.shared.bus.flush();
                    let reason = self.describe_crash(&what);
                    self.shared.end.report(exit_code::CRASH, reason);
                    break;
                }
            }
        }
        debug!("vCPU {} ends; exits: {:?}", self.id, self.exits);
        lock(&self.shared.state).parked[usize::from(self.id)] = true;
        self.shared.changed.notify_all();
        self.fd
    }

    /// Runs the guest to its next exit and handles it.
    fn step(&mut self) -> Next {
        let bus = &self.shared.bus;
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(error) => {
                return match error.errno() {
                    libc::EINTR => Next::Park,
                    // A vCPU that waited for its start-up IPI has got it.
                    libc::EAGAIN => Next::Run,
                    _ => Next::Crash(format!("KVM_RUN failed: {error}")),
                };
            }
        };
        match exit {
            VcpuExit::IoIn(port, data) => {
                self.exits.port_reads += 1;
                bus.read_port(port, data);
            }
            VcpuExit::IoOut(port, data) => {
                self.exits.port_writes += 1;
                match bus.write_port(port, data) {
                    Outcome::Continue => {}
                    Outcome::PowerOff => {
                        return Next::End(
                            exit_code::POWER_OFF,
                            "the guest powered itself off".into(),
                        );
                    }
                    Outcome::Reset => {
                        return Next::End(exit_code::RESET, "the guest reset itself".into());
                    }
                    Outcome::Prepared => self.hold(),
                }
            }
            VcpuExit::MmioRead(address, data) => {
                self.exits.mmio_reads += 1;
                bus.read_mmio(address, data);
            }
            VcpuExit::MmioWrite(address, data) => {
                self.exits.mmio_writes += 1;
                bus.write_mmio(address, data);
            }
            VcpuExit::Intr => return Next::Park,
            VcpuExit::Shutdown => return Next::Crash("triple fault".into()),
            VcpuExit::FailEntry(reason, cpu) => {
                return Next::Crash(format!(
                    "the processor refused to enter the guest, reason {reason:#x}, host CPU {cpu}"
                ));
            }
            VcpuExit::InternalError => return Next::Crash(internal_error(&mut self.fd)),
            VcpuExit::MemoryFault { flags, gpa, size } => {
                return Next::Crash(format!(
                    "memory fault at guest address {gpa:#x}, size {size:#x}, flags {flags:#x}"
                ));
            }
            VcpuExit::SystemEvent(kind, data) => {
                return Next::Crash(format!("system event {kind}, data {data:x?}"));
            }
            VcpuExit::Unknown => {
                // SAFETY: KVM fills `hw` for KVM_EXIT_UNKNOWN.
                let reason = unsafe {
                    self.fd
                        .get_kvm_run()
                        .__bindgen_anon_1
                        .hw
                        .hardware_exit_reason
                };
                return Next::Crash(format!(
                    "an exit that KVM does not know, hardware reason {reason:#x}"
                ));
            }
            other => {
                let what = format!("an exit that this machine cannot have: {other:?}");
                return Next::Crash(what);
            }
        }
        Next::Run
    }

    /// The guest is where a template is saved, if one is wanted and this is the first time: stops as soon as KVM has completed the
    /// instruction that said so.
    fn hold(&self) {
        let Some(prepared) = lock(&self.shared.prepared).take() else {
            return;
        };
        lock(&self.shared.state).held = true;
        self.kick.set(1);
        // A new event's counter is not full.
        let _ = prepared.write(1);
    }

    /// Waits while the target is not `Run`. Returns the new target.
    fn park(&self) -> Target {
        let me = usize::from(self.id);
        let mut state = lock(&self.shared.state);
        loop {
            match state.target {
                Target::Run if !state.held => {
                    // Under the lock: a later `pause` sets it again.
                    self.kick.set(0);
                    state.parked[me] = false;
                    return Target::Run;
                }
                Target::Stop => return Target::Stop,
                Target::Pause | Target::Run => {
                    if !state.parked[me] {
                        state.parked[me] = true;
                        self.shared.changed.notify_all();
                    }
                }
            }
            if let Some(msrs) = state.save.clone()
                && state.saved[me].is_none()
            {
                drop(state);
                let saved = VcpuState::save(&self.fd, &msrs);
                state = lock(&self.shared.state);
                state.saved[me] = Some(saved);
                self.shared.changed.notify_all();
                continue;
            }
            state = self
                .shared
                .changed
                .wait(state)
                .unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    /// One line for a crash; the registers go to the log.
    fn describe_crash(&self, what: &str) -> String {
        let mut line = format!("vCPU {}: {what}", self.id);
        match self.fd.get_regs() {
            Ok(regs) => {
                let _ = write!(line, ", rip {:#x}", regs.rip);
                debug!("vCPU {}: {regs:x?}", self.id);
            }
            Err(error) => {
                let _ = write!(line, " (registers unreadable: {error})");
            }
        }
        if let Ok(sregs) = self.fd.get_sregs() {
            debug!("vCPU {}: {sregs:x?}", self.id);
        }
        line
    }
}

/// Describes KVM_EXIT_INTERNAL_ERROR with KVM's own data.
pub(crate) fn internal_error(fd: &mut VcpuFd) -> String {
    // SAFETY: KVM fills `internal` for KVM_EXIT_INTERNAL_ERROR.
    let internal = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal };
    let name = match internal.suberror {
        1 => "emulation failure",
        2 => "simultaneous exceptions",
        3 => "event delivery failed",
        4 => "unexpected exit reason",
        _ => "unknown",
    };
    let count = (internal.ndata as usize).min(internal.data.len());
    format!(
        "KVM internal error, suberror {} ({name}), data {:x?}",
        internal.suberror,
        &internal.data[..count]
    )
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // Nothing: its arrival makes KVM_RUN return.
}

/// Makes SIGRTMIN interrupt KVM_RUN instead of ending the process.
pub(crate) fn install_kick_handler() -> Result<(), VcpuError> {
    static INSTALLED: OnceLock<Option<i32>> = OnceLock::new();
    let failed = INSTALLED.get_or_init(|| {
        register_signal_handler(SIGRTMIN(), on_kick)
            .err()
            .map(|error| error.errno())
    });
    match failed {
        None => Ok(()),
        Some(errno) => Err(VcpuError::Signal(io::Error::from_raw_os_error(*errno))),
    }
}
