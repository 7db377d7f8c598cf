// Included by build scripts: what the command and its workers must have in common.

/// Crates of which the command, the wheel and the worker without Python consist and whose meaning all must share.
const CORE: [&str; 7] = ["core", "collective", "control", "comm", "checkpoint", "data", "worker"];

/// A name for the sources of the core: the same for the same text, wherever and however it is built.
fn core_identity() -> String {
    let here = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut above = here.ancestors().map(|folder| folder.join("crates"));
    let crates = above.find(|folder| folder.join("hgct-core").exists()).unwrap_or_default();
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut mix = |bytes: &[u8]| {
        for byte in bytes.iter().chain(&[0]) {
            // FNV-1a: nobody attacks his own build.
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    };
    for name in CORE {
        let folder = crates.join(format!("hgct-{name}/src"));
        println!("cargo::rerun-if-changed={}", folder.display());
        let mut files = Vec::new();
        sources(&folder, &mut files);
        files.sort();
        for file in files {
            let relative = file.strip_prefix(&crates).unwrap_or(&file);
            mix(relative.to_string_lossy().as_bytes());
            mix(&std::fs::read(&file).unwrap_or_default());
        }
    }
    format!("{hash:016x}")
}

/// Rust sources below a folder, without those of tests.
fn sources(folder: &std::path::Path, found: &mut Vec<std::path::PathBuf>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let is_test = path.file_stem().is_some_and(|stem| {
            let stem = stem.to_string_lossy();
            stem == "tests" || stem.ends_with("_tests")
        });
        if path.is_dir() && !is_test {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") && !is_test {
            found.push(path);
        }
    }
}
