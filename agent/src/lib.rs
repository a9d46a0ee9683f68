//! The guest's agent: PID 1 of the microVM. It boots the guest's user space, dials the host over vsock, and runs
//! containers as it is told, until the host goes or says so.
//!
//! A library so that its tests can serve it over unix sockets on a development machine, without a guest; the
//! program is `main.rs`. One thread; see [`serve`] for the pieces at work and [`init`] for a container's first
//! steps.

pub mod boot;
pub mod cgroup;
pub mod container;
pub mod control;
pub mod device_filter;
pub mod devices;
pub mod entropy;
pub mod error;
pub mod exec;
pub mod fault;
pub mod forget;
pub mod handshake;
pub mod hooks;
pub mod hotplug;
pub mod init;
pub mod joiner;
pub mod json_path;
pub mod kept;
pub mod last_close;
pub mod launch;
pub mod log;
pub mod mount_options;
pub mod mounts;
pub mod network;
pub mod paths;
pub mod pid1;
pub mod power;
pub mod process;
pub mod read_ahead;
pub mod reaper;
pub mod registry;
pub mod seccomp;
pub mod serve;
pub mod service;
pub mod spec;
pub mod streams;
pub mod sys;
pub mod task;
pub mod terminal;
pub mod timeline;
pub mod transport;
pub mod user_namespace;
