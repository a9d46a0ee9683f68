//! An emulated host with a working /dev/kvm, for machines that have none of their own: boots Debian's generic
//! kernel in QEMU over the machine's own root file system and runs commands in it. The README beside this crate
//! says how it is used and how far it can be trusted.
//!
//! Outside: [`packages`] fetches kernel and QEMU, [`image`] makes the initramfs, [`machine`] starts QEMU,
//! [`supervisor`] watches over it, [`client`] runs a command. Inside: [`guest`] is the init. Both sides speak
//! [`frame`]s.

mod autopsy;
pub mod client;
pub mod console;
pub mod cpio;
pub mod frame;
pub mod guest;
pub mod image;
pub mod machine;
pub mod modules;
pub mod packages;
pub mod payload;
pub mod state;
pub mod supervisor;
