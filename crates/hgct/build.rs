//! Writes the identity of the core into the build: a worker refuses orders of another one. And lists
//! `accelerators/*.toml`, so that adding an accelerator is adding a file.

use std::fmt::Write as _;

include!("../../scripts/core_identity.rs");

fn main() -> std::io::Result<()> {
    println!("cargo::rerun-if-changed=../../scripts/core_identity.rs");
    println!("cargo::rustc-env=HGCT_CORE={}", core_identity());
    list_accelerators()
}

/// Writes every accelerator's file with its text, as an array.
fn list_accelerators() -> std::io::Result<()> {
    let variable =
        |name| std::env::var_os(name).map(std::path::PathBuf::from).ok_or(std::io::ErrorKind::NotFound);
    let folder = variable("CARGO_MANIFEST_DIR")?.join("../../accelerators").canonicalize()?;
    println!("cargo::rerun-if-changed={}", folder.display());
    let mut files = Vec::new();
    for entry in std::fs::read_dir(&folder)? {
        files.push(entry?.path());
    }
    files.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    files.sort();
    let mut list = String::from("[\n");
    for path in files {
        println!("cargo::rerun-if-changed={}", path.display());
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let (file, path) = (format!("accelerators/{name}"), path.to_string_lossy());
        let _ = writeln!(list, "    ({file:?}, include_str!({path:?})),");
    }
    list.push_str("]\n");
    std::fs::write(variable("OUT_DIR")?.join("accelerators.rs"), list)
}
