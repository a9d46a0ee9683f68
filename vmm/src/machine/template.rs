//! A machine that leaves a template, and one that is made from it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
};
use kvm_ioctls::Kvm;
use vmm_sys_util::eventfd::EventFd;

use super::{
    Machine, MachineError, check, create_vcpus, create_vm, devices, kvm_error, new_event, open_kvm,
};
use crate::bus::Bus;
use crate::cmdline;
use crate::control::BootConfig;
use crate::end::EndSignal;
use crate::layout;
use crate::memory;
use crate::sync::lock;
use crate::template::TemplateState;
use crate::timeline::Timeline;
use crate::vcpu::VcpuError;
use crate::virtio::RegisterMemory;
use crate::virtio::mmio::{Transport, TransportState};

/// A template that is to be saved.
pub(super) struct NewTemplate {
    file: File,
    /// What the guest has of its host.
    inherited: String,
    /// Given when the guest is where it is to be saved.
    prepared: EventFd,
    /// The MSRs that this host's KVM has state of.
    msrs: Vec<u32>,
}

impl NewTemplate {
    /// One that is to be saved in `file`.
    pub(super) fn new(file: File, inherited: String, kvm: &Kvm) -> Result<Self, MachineError> {
        let msrs = kvm
            .get_msr_index_list()
            .map_err(kvm_error("listing the MSRs"))?;
        Ok(Self {
            file,
            inherited,
            prepared: new_event()?,
            msrs: msrs.as_slice().to_vec(),
        })
    }
}

impl Machine {
    /// Builds a machine whose vCPUs do not run yet, and are where `template` was saved.
    pub fn restore(
        config: &BootConfig,
        kvm: OwnedFd,
        template: OwnedFd,
        timeline: Arc<Timeline>,
        end: Arc<EndSignal>,
    ) -> Result<Self, MachineError> {
        check(config)?;
        let kvm = open_kvm(kvm)?;
        let template = File::from(template);
        let state = TemplateState::load(&template, config, &cmdline::inherited())?;
        let guest_memory = memory::restore(config.memory_mib, &template)?;
        timeline.mark("template mapped");
        let registers = RegisterMemory::new(layout::MAX_SLOTS).map_err(MachineError::Registers)?;
        let vm = create_vm(&kvm, &guest_memory, &registers)?;
        timeline.mark("vm created");
        let vcpus = create_vcpus(&kvm, &vm, config.vcpus)?;
        let wrong = |vcpu| move |source| VcpuError::State { vcpu, source };
        let tsc = state.vcpus[0].tsc().map_err(wrong(0))?;
        // SAFETY: every x86-64 processor has the instruction.
        let offset = tsc.wrapping_sub(unsafe { std::arch::x86_64::_rdtsc() });
        for (id, (vcpu, state)) in vcpus.iter().zip(&state.vcpus).enumerate() {
            state.restore(vcpu, offset).map_err(wrong(id as u8))?;
        }
        timeline.mark("vcpus created");

        let devices = devices(config)?;
        if devices.len() != state.devices.len() {
            return Err(MachineError::Count("devices"));
        }
        let slots = devices.len() + usize::from(config.spare_slots);
        let bus = Bus::new(slots, registers, None, Arc::clone(&timeline));
        let machine = Self::assemble(vm, vcpus, guest_memory, bus, devices, timeline, end)?;
        for irqchip in &state.irqchips {
            machine
                .vm
                .set_irqchip(irqchip)
                .map_err(kvm_error("setting an interrupt controller"))?;
        }
        // After the interrupt controllers: devices interrupt when they go on.
        machine.carry_on(&state.devices)?;
        let clock = kvm_clock_data {
            clock: state.clock.clock,
            ..Default::default()
        };
        machine
            .vm
            .set_clock(&clock)
            .map_err(kvm_error("setting the clock"))?;
        machine.timeline.mark("devices ready");
        Ok(machine)
    }

    /// Readable when the guest stands where a template is to be saved, if one is.
    pub fn prepared(&self) -> Option<&EventFd> {
        self.template.as_ref().map(|template| &template.prepared)
    }

    /// Saves the template and closes its file. The vCPUs stand still, before and after; [`Self::release`] ends that.
    pub fn save_template(&mut self, config: &BootConfig) -> Result<(), MachineError> {
        let (Some(template), Some(threads)) = (self.template.take(), &self.threads) else {
            return Ok(());
        };
        let vcpus = threads.save(&template.msrs)?;
        let irqchips = [
            KVM_IRQCHIP_PIC_MASTER,
            KVM_IRQCHIP_PIC_SLAVE,
            KVM_IRQCHIP_IOAPIC,
        ];
        let irqchips = irqchips.into_iter().map(|chip_id| {
            let mut irqchip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            self.vm.get_irqchip(&mut irqchip).map(|()| irqchip)
        });
        let irqchips = irqchips
            .collect::<Result<_, _>>()
            .map_err(kvm_error("reading an interrupt controller"))?;
        let clock = self
            .vm
            .get_clock()
            .map_err(kvm_error("reading the clock"))?;
        let devices = self
            .bus
            .slots()
            .iter()
            .map_while(|slot| lock(slot).as_mut().map(Transport::stand_still))
            .collect();
        let mut config = config.clone();
        // Whose it was is nobody's business.
        config.vsock_path.clear();
        if let Some(share) = &mut config.share {
            share.directory.clear();
        }
        let state = TemplateState {
            config,
            inherited: template.inherited,
            irqchips,
            clock,
            vcpus,
            devices,
        };
        let mut file = template.file;
        let saved = state.save(&self.memory(), &mut file);
        self.carry_on(&state.devices)?;
        Ok(saved?)
    }

    /// Lets vCPUs go on that stand where a template was to be saved.
    pub fn release(&self) {
        if let Some(threads) = &self.threads {
            threads.release();
        }
    }

    fn carry_on(&self, devices: &[TransportState]) -> Result<(), MachineError> {
        for (slot, state) in self.bus.slots().iter().zip(devices) {
            if let Some(transport) = &mut *lock(slot) {
                transport.carry_on(state)?;
            }
        }
        Ok(())
    }
}
