//! The sandbox server: one per sandbox, containerd's Task API over the `runtime` library.
//!
//! `serve` runs a server on a listener that it inherits; `bulkhead` starts it so ([`bulkhead_runtime::launch`]).

mod exits;
mod logging;
mod metrics;
mod serve;
mod service;

use std::process::ExitCode;

use anyhow::Context;
use bulkhead_runtime::launch::{SERVE, ServerArgs};

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let result = match args.next().as_deref().and_then(|arg| arg.to_str()) {
        Some(SERVE) => ServerArgs::parse(args)
            .context("wrong arguments of `serve`")
            .and_then(serve::serve),
        Some("-v" | "--version") => {
            println!("containerd-shim-bulkhead-v2 {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        _ => Err(anyhow::anyhow!(
            "this is the sandbox server of Bulkhead, which `bulkhead` starts: run `bulkhead --help`"
        )),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("containerd-shim-bulkhead-v2: {error:#}");
            ExitCode::FAILURE
        }
    }
}
