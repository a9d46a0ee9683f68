//! Templates: a guest that has booted as far as all guests are alike, in a file, to start others from.
//!
//! The file is the guest's memory, piece after piece as [`memory::pieces`] says and sparse where nothing was ever written, and after it
//! everything else as JSON. Guests map the memory privately: they share its pages until they write to them.
//!
//! A template belongs to the host, kernel and processor that it was saved on; whoever keeps it sees to that. It is the host's own file, and
//! what KVM makes of a wrong one stays within the guest.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use kvm_bindings::{kvm_clock_data, kvm_irqchip};
use serde::{Deserialize, Serialize};
use vm_memory::{Address, Bytes, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

use crate::control::BootConfig;
use crate::vcpu_state::VcpuState;
use crate::virtio::mmio::TransportState;

/// Most bytes of the JSON: a vCPU takes 25 KiB.
const MAX_STATE: u64 = 8 << 20;
/// Size of the host's pages.
const PAGE: usize = 4096;
/// Pages looked at and written at a time.
const BATCH: usize = 256;
/// A page that the process has touched: present or swapped (Documentation/admin-guide/mm/pagemap.rst, bits 63 and 62).
const TOUCHED: u64 = 0b11 << 62;

/// Why a template could not be saved or read.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The file, or guest memory.
    #[error("cannot {0} the template")]
    File(&'static str, #[source] io::Error),
    /// It is cut off, or something else.
    #[error("the template is damaged")]
    Damaged,
    /// The JSON is not what this version writes.
    #[error("the template is not one of this version's")]
    State(#[source] serde_json::Error),
    /// It is of a machine of another shape.
    #[error("the template is of another machine: {0} differs")]
    Shape(&'static str),
}

/// Everything of a guest but its memory.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TemplateState {
    /// What it was booted with.
    pub config: BootConfig,
    /// What it had of its host at that time ([`crate::cmdline::inherited`]): some of that may be changed without a boot of the host.
    pub inherited: String,
    /// The two PICs and the IO-APIC.
    pub irqchips: Vec<kvm_irqchip>,
    /// The guest's clock.
    pub clock: kvm_clock_data,
    /// The vCPUs in order.
    pub vcpus: Vec<VcpuState>,
    /// The devices in the order of their slots, which have no gaps.
    pub devices: Vec<TransportState>,
}

impl TemplateState {
    /// Writes a template into an empty file. The guest and its devices must stand still.
    pub fn save(&self, memory: &GuestMemoryMmap, file: &mut File) -> Result<(), TemplateError> {
        let write = |error| TemplateError::File("write", error);
        let end = save_memory(memory, file).map_err(write)?;
        let state = serde_json::to_vec(self).map_err(TemplateError::State)?;
        file.set_len(end).map_err(write)?;
        file.seek(SeekFrom::Start(end)).map_err(write)?;
        file.write_all(&state).map_err(write)
    }

    /// Reads what a template for a machine of `config`, with `inherited` from its host, says beside the memory.
    pub fn load(file: &File, config: &BootConfig, inherited: &str) -> Result<Self, TemplateError> {
        let read = |error| TemplateError::File("read", error);
        let memory = config.memory_mib << 20;
        let length = file.metadata().map_err(read)?.len();
        let length = length
            .checked_sub(memory)
            .filter(|length| (1..=MAX_STATE).contains(length))
            .ok_or(TemplateError::Damaged)?;
        let mut bytes = vec![0; length as usize];
        file.read_exact_at(&mut bytes, memory).map_err(read)?;
        let state: Self = serde_json::from_slice(&bytes).map_err(TemplateError::State)?;
        match state.difference(config, inherited) {
            Some(what) => Err(TemplateError::Shape(what)),
            None => Ok(state),
        }
    }

    /// What keeps a machine of `config` from being made of this one.
    fn difference(&self, config: &BootConfig, inherited: &str) -> Option<&'static str> {
        let shared = |config: &BootConfig| {
            config
                .share
                .as_ref()
                .map(|share| (share.tag.clone(), share.queues))
        };
        let differences = [
            ("vcpus", self.config.vcpus != config.vcpus),
            ("vcpus", self.vcpus.len() != usize::from(config.vcpus)),
            ("memory_mib", self.config.memory_mib != config.memory_mib),
            ("cmdline", self.config.cmdline != config.cmdline),
            ("the host's settings", self.inherited != inherited),
            ("spare_slots", self.config.spare_slots != config.spare_slots),
            ("share", shared(&self.config) != shared(config)),
            ("serial", self.config.serial || config.serial),
        ];
        differences
            .into_iter()
            .find_map(|(what, differs)| differs.then_some(what))
    }
}

/// Writes guest memory; returns its length.
fn save_memory(memory: &GuestMemoryMmap, file: &mut File) -> io::Result<u64> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut offset = 0;
    for region in memory.iter() {
        let pages = usize::try_from(region.len()).unwrap_or(usize::MAX) / PAGE;
        let first = region.as_ptr() as usize / PAGE;
        for batch in (0..pages).step_by(BATCH) {
            let count = BATCH.min(pages - batch);
            let mut entries = [0; BATCH * 8];
            let entries = &mut entries[..count * 8];
            pagemap.read_exact_at(entries, (first + batch) as u64 * 8)?;
            for (index, entry) in entries.chunks_exact(8).enumerate() {
                let entry = u64::from_ne_bytes(entry.try_into().unwrap_or_default());
                if entry & TOUCHED == 0 {
                    continue;
                }
                let within = ((batch + index) * PAGE) as u64;
                let mut page = [0; PAGE];
                memory
                    .read_slice(&mut page, region.start_addr().unchecked_add(within))
                    .map_err(io::Error::other)?;
                if page.iter().any(|byte| *byte != 0) {
                    file.write_all_at(&page, offset + within)?;
                }
            }
        }
        offset += region.len();
    }
    Ok(offset)
}
