//! The machine: builds a guest from its configuration and drives its life.

mod template;

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use kvm_bindings::{
    KVM_CAP_PMU_CAPABILITY, KVM_MAX_CPUID_ENTRIES, KVM_PMU_CAP_DISABLE, kvm_enable_cap,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use tracing::info;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    GuestAddressSpace, GuestMemory, GuestMemoryAtomic, GuestMemoryError, GuestMemoryMmap,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::template::NewTemplate;
use crate::boot;
use crate::bus::Bus;
use crate::cmdline::{self, CmdlineError};
use crate::control::{AttachConfig, BootConfig, ShareConfig};
use crate::cpuid;
use crate::end::EndSignal;
use crate::layout;
use crate::loader::{self, LoadError};
use crate::memory::{self, MemoryError};
use crate::mptable;
use crate::probe;
use crate::serial::SerialPort;
use crate::sync::lock;
use crate::template::TemplateError;
use crate::thread;
use crate::timeline::Timeline;
use crate::vcpu::{self, MAX_VCPUS, VcpuError, VcpuSet};
use crate::virtio::console::Console;
use crate::virtio::event::{QueueHandler, QueueSubscriber};
use crate::virtio::fs::{Fs, FsError};
use crate::virtio::mmio::{CarryOnError, INTERRUPT_ACK, QUEUE_NOTIFY, Transport, USED_BUFFERS};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::Vsock;
use crate::virtio::{Memory, RegisterMemory, VirtioDevice};

/// The guest's vsock context identifier: the first one that is not reserved. Each guest has a VMM of its own, so all may have it.
pub const GUEST_CID: u64 = 3;

/// Most spare slots.
pub const MAX_SPARE_SLOTS: u8 = 16;

/// Why a machine could not be built or changed.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// A field of the configuration is out of range.
    #[error("{field} is {value}, and must be between {min} and {max}")]
    OutOfRange {
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// Least value.
        min: u64,
        /// Greatest value.
        max: u64,
    },
    /// A serial port without output, or the other way round.
    #[error("a descriptor for the serial port's output must be given if and only if serial is set")]
    SerialOutput,
    /// A KVM operation failed.
    #[error("{operation} failed")]
    Kvm {
        /// Which one.
        operation: &'static str,
        /// Cause.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM lacks something.
    #[error("this host's KVM lacks {0}")]
    Missing(String),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel or initramfs.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Command line.
    #[error(transparent)]
    Cmdline(#[from] CmdlineError),
    /// Writing boot structures.
    #[error("cannot write to guest memory")]
    Write(#[from] GuestMemoryError),
    /// The devices' registers could not be mapped.
    #[error("cannot map the devices' registers")]
    Registers(#[source] MmapRegionError),
    /// vCPUs.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// The file-system device.
    #[error("share")]
    Share(#[from] FsError),
    /// An eventfd could not be made.
    #[error("cannot make a device's eventfd")]
    Event(#[source] io::Error),
    /// The vsock's unix socket could not be made.
    #[error("vsock_path: cannot listen on {}", path.display())]
    VsockPath {
        /// Its path.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A template.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// A device of a template.
    #[error(transparent)]
    Device(#[from] CarryOnError),
    /// A template has other vCPUs or devices than its description says.
    #[error("the template has {0} of the wrong number")]
    Count(&'static str),
    /// A thread could not be started.
    #[error("cannot start the loader's thread")]
    Thread(#[source] io::Error),
    /// A bug.
    #[error("the loader panicked")]
    LoaderPanic,
    /// No empty slot is left.
    #[error("no spare virtio-mmio slot is left")]
    NoSlot,
}

/// The open files a machine is built from.
#[derive(Debug)]
pub struct BootFiles {
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// The kernel.
    pub kernel: OwnedFd,
    /// The initramfs.
    pub initramfs: OwnedFd,
    /// Where the serial port's output goes.
    pub serial: Option<OwnedFd>,
    /// Where a template is to be saved.
    pub template: Option<OwnedFd>,
}

/// A guest.
pub struct Machine {
    // Declared in the order of their dependence: threads end before the VM and its memory go.
    threads: Option<VcpuSet>,
    vcpus: Vec<VcpuFd>,
    vm: VmFd,
    bus: Arc<Bus>,
    memory: Memory,
    end: Arc<EndSignal>,
    timeline: Arc<Timeline>,
    subscribers: Vec<QueueSubscriber>,
    many_files: Vec<EventFd>,
    template: Option<NewTemplate>,
}

impl Machine {
    /// Builds a machine whose vCPUs do not run yet.
    pub fn new(
        config: &BootConfig,
        files: BootFiles,
        timeline: Arc<Timeline>,
        end: Arc<EndSignal>,
    ) -> Result<Self, MachineError> {
        check(config)?;
        if config.serial != files.serial.is_some() {
            return Err(MachineError::SerialOutput);
        }
        let memory_bytes = config.memory_mib << 20;
        let kvm = open_kvm(files.kvm)?;
        let guest_memory = memory::create(config.memory_mib)?;
        timeline.mark("memory mapped");

        // Making a VM is mostly waiting: some host kernels wait for RCU grace periods, 10 ms and more, to put a worker of KVM's into
        // our cgroup. Loading is all work. So they go side by side.
        let load = || {
            let kernel =
                loader::load_kernel(&File::from(files.kernel), &guest_memory, memory_bytes)?;
            let initramfs = loader::load_initramfs(
                &File::from(files.initramfs),
                &guest_memory,
                memory_bytes,
                kernel.end,
            )?;
            timeline.mark("kernel loaded");
            Ok::<_, MachineError>((kernel, initramfs))
        };
        let registers = RegisterMemory::new(layout::MAX_SLOTS).map_err(MachineError::Registers)?;
        let (vm, loaded) = std::thread::scope(|scope| {
            let loader = thread::spawn_scoped(thread::Kind::Loader, scope, load)
                .map_err(MachineError::Thread)?;
            let vm = create_vm(&kvm, &guest_memory, &registers)?;
            timeline.mark("vm created");
            let loaded = loader.join().map_err(|_| MachineError::LoaderPanic)?;
            Ok::<_, MachineError>((vm, loaded))
        })?;
        let (kernel, initramfs) = loaded?;

        let serial = match files.serial {
            Some(output) => Some(serial_port(&vm, output)?),
            None => None,
        };
        let devices = devices(config)?;
        let slots = devices.len() + usize::from(config.spare_slots);
        let inherited = cmdline::inherited();
        let cmdline = cmdline::build(slots, config.serial, &inherited, &config.cmdline)?;
        boot::write_boot_params(&guest_memory, memory_bytes, &cmdline, &initramfs)?;
        boot::write_page_tables(&guest_memory)?;
        boot::write_gdt(&guest_memory)?;
        mptable::write(&guest_memory, config.vcpus, slots, config.serial)?;

        let vcpus = create_vcpus(&kvm, &vm, config.vcpus)?;
        vcpu::set_entry(&vcpus[0], kernel.entry)?;
        timeline.mark("vcpus created");

        let bus = Bus::new(slots, registers, serial, Arc::clone(&timeline));
        let mut machine = Self::assemble(vm, vcpus, guest_memory, bus, devices, timeline, end)?;
        if let Some(file) = files.template {
            machine.template = Some(NewTemplate::new(file.into(), inherited, &kvm)?);
        }
        machine.timeline.mark("devices ready");
        Ok(machine)
    }

    /// A machine of these parts, with its devices in the first slots.
    fn assemble(
        vm: VmFd,
        vcpus: Vec<VcpuFd>,
        memory: GuestMemoryMmap,
        bus: Bus,
        devices: Vec<Device>,
        timeline: Arc<Timeline>,
        end: Arc<EndSignal>,
    ) -> Result<Self, MachineError> {
        let mut machine = Self {
            threads: None,
            vcpus,
            bus: Arc::new(bus),
            vm,
            memory: GuestMemoryAtomic::new(memory),
            end,
            timeline,
            subscribers: Vec::new(),
            many_files: Vec::new(),
            template: None,
        };
        for device in devices {
            machine.plug(device)?;
        }
        Ok(machine)
    }

    /// Lets the vCPUs run for the first time.
    pub fn start(&mut self) -> Result<(), MachineError> {
        let prepared = self.prepared().map(EventFd::try_clone).transpose();
        let prepared = prepared.map_err(MachineError::Event)?;
        self.threads = Some(VcpuSet::start(
            std::mem::take(&mut self.vcpus),
            Arc::clone(&self.bus),
            Arc::clone(&self.end),
            Arc::clone(&self.timeline),
            prepared,
        )?);
        Ok(())
    }

    /// Stops every vCPU. Returns when all stand still.
    pub fn pause(&self) -> Result<(), MachineError> {
        if let Some(threads) = &self.threads {
            threads.pause()?;
        }
        Ok(())
    }

    /// Lets the vCPUs run again.
    pub fn resume(&self) {
        if let Some(threads) = &self.threads {
            threads.resume();
        }
    }

    /// Fills a spare slot. Returns the address of its registers.
    pub fn attach(&mut self, config: &AttachConfig) -> Result<u64, MachineError> {
        let device = match config {
            AttachConfig::Rng => {
                let rng = Rng::new();
                Device::served(rng.handler(), rng)
            }
            AttachConfig::Fs(share) => Device::share(share)?,
        };
        self.plug(device)
    }

    /// The guest's memory.
    pub fn memory(&self) -> impl Deref<Target = GuestMemoryMmap> + use<> {
        self.memory.memory()
    }

    /// Subscribers for the event loop, of the devices added since the last call.
    pub fn take_subscribers(&mut self) -> Vec<QueueSubscriber> {
        std::mem::take(&mut self.subscribers)
    }

    /// Of the shares added since the last call: readable when the guest holds many files of one.
    pub fn take_many_files(&mut self) -> Vec<EventFd> {
        std::mem::take(&mut self.many_files)
    }

    /// Puts a device into the first empty slot.
    fn plug(&mut self, device: Device) -> Result<u64, MachineError> {
        let (index, slot) = self
            .bus
            .slots()
            .iter()
            .enumerate()
            .find(|(_, slot)| lock(slot).is_none())
            .ok_or(MachineError::NoSlot)?;
        let base = layout::slot_base(index);
        let irqfd = new_event()?;
        self.vm
            .register_irqfd(&irqfd, layout::VIRTIO_IRQS[index])
            .map_err(kvm_error("registering an irqfd"))?;
        let registers = self.bus.registers(index);
        let transport = Transport::new(device.virtio, self.memory.clone(), irqfd, registers)
            .map_err(MachineError::Event)?;
        let listen = |event: &EventFd, register, value: u32| {
            self.vm
                .register_ioevent(event, &IoEventAddress::Mmio(base + register), value)
                .map_err(kvm_error("registering an ioeventfd"))
        };
        for (queue, kick) in transport.kicks().iter().enumerate() {
            listen(kick, QUEUE_NOTIFY, queue as u32)?;
        }
        // Nobody waits for it: that the guest need not leave KVM for this write is all that it is for.
        listen(&new_event()?, INTERRUPT_ACK, USED_BUFFERS)?;
        if let Some(handler) = device.handler {
            let kicks = transport
                .kicks()
                .iter()
                .map(EventFd::try_clone)
                .collect::<Result<_, _>>()
                .map_err(MachineError::Event)?;
            self.subscribers.push(QueueSubscriber::new(kicks, handler));
        }
        self.many_files.extend(device.many_files);
        info!("virtio {} at {base:#x}", transport.name());
        *lock(slot) = Some(transport);
        Ok(base)
    }
}

/// A device on its way into a slot.
struct Device {
    virtio: Box<dyn VirtioDevice>,
    /// Set for a device whose queues the event loop serves.
    handler: Option<Arc<Mutex<dyn QueueHandler>>>,
    /// Set for a share: readable when the guest holds many of its files.
    many_files: Option<EventFd>,
}

impl Device {
    fn own_threads(device: impl VirtioDevice + 'static) -> Self {
        Self {
            virtio: Box::new(device),
            handler: None,
            many_files: None,
        }
    }

    fn share(config: &ShareConfig) -> Result<Self, MachineError> {
        let fs = Fs::new(config)?;
        let many_files = fs.many_files().try_clone().map_err(MachineError::Event)?;
        Ok(Self {
            many_files: Some(many_files),
            ..Self::own_threads(fs)
        })
    }

    fn served(handler: Arc<Mutex<dyn QueueHandler>>, device: impl VirtioDevice + 'static) -> Self {
        Self {
            virtio: Box::new(device),
            handler: Some(handler),
            many_files: None,
        }
    }
}

/// The devices of every machine, in the order of their slots.
fn devices(config: &BootConfig) -> Result<Vec<Device>, MachineError> {
    let mut devices = vec![Device::own_threads(vsock(&config.vsock_path)?)];
    if let Some(share) = &config.share {
        devices.push(Device::share(share)?);
    }
    let console = Console::new();
    devices.push(Device::served(console.handler(), console));
    let rng = Rng::new();
    devices.push(Device::served(rng.handler(), rng));
    Ok(devices)
}

fn check(config: &BootConfig) -> Result<(), MachineError> {
    let ranges = [
        ("vcpus", u64::from(config.vcpus), 1, u64::from(MAX_VCPUS)),
        (
            "spare_slots",
            config.spare_slots.into(),
            0,
            MAX_SPARE_SLOTS.into(),
        ),
    ];
    for (field, value, min, max) in ranges {
        if !(min..=max).contains(&value) {
            return Err(MachineError::OutOfRange {
                field,
                value,
                min,
                max,
            });
        }
    }
    Ok(())
}

fn open_kvm(fd: OwnedFd) -> Result<Kvm, MachineError> {
    // SAFETY: the descriptor is owned and given away. If it is not /dev/kvm, every ioctl on it fails.
    let kvm = unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) };
    let missing = probe::missing_capabilities(&kvm);
    if missing.is_empty() {
        Ok(kvm)
    } else {
        Err(MachineError::Missing(missing.join(", ")))
    }
}

/// Makes a VM with its memory and interrupt controllers.
fn create_vm(
    kvm: &Kvm,
    memory: &GuestMemoryMmap,
    registers: &RegisterMemory,
) -> Result<VmFd, MachineError> {
    let vm = kvm.create_vm().map_err(kvm_error("creating the VM"))?;
    vm.set_tss_address(layout::KVM_TSS)
        .map_err(kvm_error("setting the TSS address"))?;
    // Before the vCPUs: each gets its local APIC then. There is no PIT: the guest knows its clocks' frequencies.
    vm.create_irq_chip()
        .map_err(kvm_error("creating the interrupt controllers"))?;
    memory::register(&vm, memory)?;
    registers
        .register(&vm, memory.num_regions() as u32)
        .map_err(kvm_error("registering the devices' registers"))?;
    hide_performance_monitor(&vm)?;
    Ok(vm)
}

/// Takes the performance counters from the guest, where KVM can (since Linux 5.18). CPUID alone does not hide AMD's oldest ones.
fn hide_performance_monitor(vm: &VmFd) -> Result<(), MachineError> {
    let offered = vm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into());
    if offered & KVM_PMU_CAP_DISABLE as i32 == 0 {
        return Ok(());
    }
    let mut cap = kvm_enable_cap {
        cap: KVM_CAP_PMU_CAPABILITY,
        ..Default::default()
    };
    cap.args[0] = KVM_PMU_CAP_DISABLE.into();
    vm.enable_cap(&cap)
        .map_err(kvm_error("disabling the performance monitor"))
}

/// The socket device with its unix socket at `path`.
fn vsock(path: &Path) -> Result<Vsock, MachineError> {
    let listener = UnixListener::bind(path).map_err(|source| MachineError::VsockPath {
        path: path.to_owned(),
        source,
    })?;
    Ok(Vsock::new(GUEST_CID, listener, path.to_owned()))
}

fn create_vcpus(kvm: &Kvm, vm: &VmFd, count: u8) -> Result<Vec<VcpuFd>, MachineError> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(kvm_error("reading the supported CPUID"))?;
    let vcpus = (0..count)
        .map(|id| vcpu::create(vm, id))
        .collect::<Result<Vec<_>, _>>()?;
    let common = cpuid::common(
        &supported,
        cpuid::Machine {
            vcpus: count,
            // Fails on hosts whose TSC is unstable: then the guest has to measure for itself.
            tsc_khz: vcpus[0].get_tsc_khz().ok(),
            tsc_deadline: vm.check_extension(Cap::TscDeadlineTimer),
        },
    );
    for (id, vcpu) in vcpus.iter().enumerate() {
        vcpu::configure(vcpu, id as u8, &common)?;
    }
    Ok(vcpus)
}

fn serial_port(vm: &VmFd, output: OwnedFd) -> Result<SerialPort, MachineError> {
    let irqfd = new_event()?;
    vm.register_irqfd(&irqfd, layout::SERIAL_IRQ)
        .map_err(kvm_error("registering an irqfd"))?;
    Ok(SerialPort::new(irqfd, File::from(output)))
}

fn new_event() -> Result<EventFd, MachineError> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(MachineError::Event)
}

fn kvm_error(operation: &'static str) -> impl Fn(kvm_ioctls::Error) -> MachineError {
    move |source| MachineError::Kvm { operation, source }
}
