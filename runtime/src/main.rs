//! `bulkhead`: the OCI command line, a thin client of the sandbox server.

mod cli;

fn main() {
    // Not by returning: a thread may still wait for input that nobody needs any more.
    std::process::exit(cli::main());
}
