//! The host side of one sandbox: everything between an OCI bundle and the guest that runs it.
//!
//! The sandbox server (`shim/`) drives [`sandbox::Sandbox`] and answers containerd's Task API; the command line
//! (`bulkhead`, this crate's binary) starts that server and is its client. What both need lives here.
//!
//! | module | subject |
//! | --- | --- |
//! | [`config`] | where programs and guest files are, defaults |
//! | [`id`] | container ids |
//! | [`spec`] | loading a bundle, refusing what a VM cannot honour |
//! | [`adapt`] | the spec as the guest is to apply it, and what the host binds for it |
//! | [`annotations`] | what a bundle's annotations say to this runtime |
//! | [`hooks`] | the hooks that run on the host |
//! | [`host_cgroup`], [`standin`], [`view`] | how a sandbox shows on the host: its cgroup, the processes that stand for the container's, and what clients see in their mount namespace |
//! | [`oom`] | whom of a sandbox the host's OOM killer takes |
//! | [`mounts_below`] | what is mounted below a bind mount's source |
//! | [`share`] | the sandbox's mount namespace and the shared directory tree |
//! | [`sizing`] | vCPUs and memory of a guest |
//! | [`vmm`] | one VMM process and its control socket |
//! | [`agent`] | the guest's agent |
//! | [`sandbox`] | the sandbox's life: boot, containers, end |
//! | [`stdio`], [`streams`] | standard streams: who attaches them, and the pumps |
//! | [`state`], [`sock`] | the state directory and the sockets in it |
//! | [`launch`] | starting a sandbox server |
//! | [`timeline`] | the boot timeline |
//! | [`preflight`], [`check`] | can this machine run guests? |

pub mod adapt;
pub mod agent;
pub mod annotations;
pub mod check;
pub mod config;
pub mod hooks;
pub mod host_cgroup;
pub mod id;
pub mod launch;
pub mod mounts_below;
pub mod oom;
pub mod preflight;
pub mod sandbox;
pub mod share;
pub mod sizing;
pub mod sock;
pub mod spec;
pub mod standin;
pub mod state;
pub mod stdio;
pub mod streams;
pub mod template;
pub mod timeline;
pub mod view;
pub mod vmm;
