//! Generates the messages and the ttrpc client and server from the `.proto`, with compilers written in Rust.

use std::path::Path;

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out_dir = std::env::var("OUT_DIR")?;
    Codegen::new()
        .out_dir(Path::new(&out_dir))
        .inputs(["proto/agent.proto"])
        .include("proto")
        .rust_protobuf()
        .customize(Customize {
            async_all: true,
            gen_mod: true,
            ..Default::default()
        })
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(true))
        .run()?;
    // `include!` takes no inner attributes, and the generated module list opens with some.
    let module_list = Path::new(&out_dir).join("mod.rs");
    let lines = std::fs::read_to_string(&module_list)?;
    let lines: Vec<_> = lines
        .lines()
        .filter(|line| !line.starts_with("#!["))
        .collect();
    std::fs::write(&module_list, lines.join("\n"))?;
    println!("cargo::rerun-if-changed=proto/agent.proto");
    Ok(())
}
