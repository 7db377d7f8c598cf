//! The repository tests itself: arrows between crates, banned calls, licences, leftovers, documents.
//! So reviews can be about design.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Every arrow between crates that may exist. One that is not listed does not; see ARCHITECTURE.md.
const ARROWS: [(&str, &[&str]); 10] = [
    ("hgct-core", &[]),
    ("hgct-collective", &["hgct-core"]),
    ("hgct-planner", &["hgct-core", "hgct-collective"]),
    ("hgct-control", &["hgct-core"]),
    ("hgct-comm", &["hgct-core", "hgct-collective"]),
    ("hgct-checkpoint", &["hgct-core"]),
    ("hgct-data", &["hgct-core"]),
    ("hgct-worker", &["hgct-core", "hgct-control", "hgct-comm", "hgct-checkpoint", "hgct-data"]),
    (
        "hgct",
        &[
            "hgct-core",
            "hgct-collective",
            "hgct-planner",
            "hgct-control",
            "hgct-comm",
            "hgct-checkpoint",
            "hgct-data",
            "hgct-worker",
        ],
    ),
    ("hgct-py", &["hgct-core", "hgct-planner", "hgct-comm", "hgct-checkpoint", "hgct-worker"]),
];

/// No I/O, clock, environment, threads, unseeded randomness, or order that varies from run to run.
const PURE: [&str; 4] = ["hgct-core", "hgct-collective", "hgct-planner", "hgct-control"];

/// What a pure crate may not name. Addresses of `std::net` are plain values and allowed.
const IMPURE: [&str; 24] = [
    "std::fs",
    "std::io",
    "std::env",
    "std::thread",
    "std::process",
    "std::os",
    "std::sync::mpsc",
    "Instant",
    "SystemTime",
    "TcpStream",
    "TcpListener",
    "UdpSocket",
    "ToSocketAddrs",
    "UnixStream",
    "HashMap",
    "HashSet",
    "RandomState",
    "getrandom",
    "println!",
    "eprintln!",
    "print!",
    "env!",
    "unsafe",
    "static mut",
];

/// Licences under which a dependency may stand.
const LICENCES: [&str; 8] = [
    "MIT",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "Unicode-3.0",
    "Zlib",
];

/// In the worker without Python beside these. MPL-2.0 asks for the source of its own files alone, which
/// are used as they are published.
const NATIVE_LICENCES: [&str; 2] = ["ISC", "MPL-2.0"];

/// Crates that would bring a foreign build system, a second async world or a heavy framework.
const BANNED: [&str; 20] = [
    "async-std",
    "aws-lc-sys",
    "bindgen",
    "burn",
    "cc",
    "cmake",
    "cxx",
    "cxx-build",
    "native-tls",
    "onig_sys",
    "openssl",
    "openssl-sys",
    "prost-build",
    "protobuf-build",
    "protobuf-codegen",
    "protoc",
    "pyo3-async-runtimes",
    "ring",
    "tch",
    "tokio",
];

/// Lines at most; a longer file wants to be two.
const MOST_LINES: usize = 600;

/// Longer files that are left as they are, each with its reason.
const LONG_FILES: [(&str, &str); 0] = [];

/// Where the project's own text lies.
const FOLDERS: [&str; 12] = [
    "accelerators",
    ".ci",
    "benchmarks",
    "crates",
    "docs",
    "environments",
    "examples",
    "fuzz",
    "python",
    "scripts",
    "vendors",
    "worker-burn",
];

#[test]
fn only_the_listed_arrows_exist_between_crates() {
    let allowed: BTreeMap<_, _> = ARROWS.into_iter().collect();
    let mut seen = BTreeSet::new();
    for path in
        files().into_iter().filter(|path| path.starts_with("crates/") && path.ends_with("/Cargo.toml"))
    {
        let manifest: toml::Table = toml::from_str(&read(&path)).unwrap();
        let name = manifest["package"]["name"].as_str().unwrap();
        let arrows = allowed.get(name).unwrap_or_else(|| panic!("{name} is in no row of ARROWS"));
        for section in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let Some(dependencies) = manifest.get(section).and_then(toml::Value::as_table) else { continue };
            for dependency in dependencies.keys().filter(|key| key.starts_with("hgct")) {
                assert!(arrows.contains(&dependency.as_str()), "{name} may not use {dependency} ({section})");
            }
        }
        seen.insert(name.to_owned());
    }
    assert_eq!(seen, allowed.keys().map(|&name| name.to_owned()).collect(), "crates and ARROWS differ");
    let architecture = read("ARCHITECTURE.md");
    for name in allowed.keys() {
        assert!(
            architecture.contains(&format!("`{name}`")),
            "ARCHITECTURE.md does not say what {name} is for"
        );
    }
}

#[test]
fn pure_crates_touch_nothing_outside() {
    let mut found = Vec::new();
    let mut num_files = 0;
    for path in files() {
        let pure = PURE.iter().any(|name| path.starts_with(&format!("crates/{name}/src/")));
        if !pure || path.ends_with("/tests.rs") || path.contains("/tests/") {
            continue;
        }
        num_files += 1;
        for (number, line) in code(&read(&path)) {
            found.extend(
                IMPURE.iter().filter(|word| names(line, word)).map(|word| format!("{path}:{number}: {word}")),
            );
        }
    }
    assert!(num_files > 30, "only {num_files} files of pure crates were looked at");
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn the_search_for_words_finds_them() {
    assert!(names("use std::fs;", "std::fs") && names("let now = Instant::now();", "Instant"));
    assert!(!names("an Instantiation", "Instant") && !names("self.print_env!()", "env!"));
    let text = "a\n// std::fs\nb\n#[cfg(test)]\nmod tests { use std::fs; }\n";
    assert_eq!(code(text), [(1, "a"), (3, "b")]);
    let known = |expression| allows(expression, &LICENCES);
    assert!(known("MIT OR GPL-3.0") && known("(MIT OR X) AND Zlib") && known("Unlicense/MIT"));
    assert!(!known("GPL-3.0") && !known("MIT AND GPL-3.0") && !known("(MIT OR X) AND Y"));
    assert!(known("Apache-2.0 WITH LLVM-exception OR X"));
}

#[test]
fn dependencies_have_allowed_licences_and_none_is_banned() {
    let metadata = metadata();
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 50, "only {} packages", packages.len());
    for package in packages {
        let (name, licence) = (package["name"].as_str().unwrap(), package["license"].as_str());
        let licence = licence.unwrap_or_else(|| panic!("{name} names no licence"));
        assert!(allows(licence, &LICENCES), "{name} stands under {licence}, which is not in LICENCES");
        assert!(!BANNED.contains(&name), "{name} is banned: see BANNED");
        if package["source"].is_null() {
            assert_eq!(licence, "Apache-2.0", "{name} is ours");
        }
    }
}

#[test]
fn so_have_those_of_the_worker_without_python() {
    let manifest = root().join("worker-burn/Cargo.toml");
    let output = cargo()
        .args(["tree", "--offline", "--locked", "--edges", "normal,build", "--prefix", "none"])
        .args(["--format", "{l}|{p}", "--target", &host(), "--manifest-path"])
        .arg(&manifest)
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() && error.contains("--offline") {
        let reason = "SKIPPED: the crates of the worker without Python are not here: run `make vulkan`";
        return writeln!(std::io::stderr(), "{reason}").unwrap();
    }
    assert!(output.status.success(), "{error}");
    let allowed = [&LICENCES[..], &NATIVE_LICENCES].concat();
    let packages = String::from_utf8(output.stdout).unwrap();
    assert!(packages.lines().count() > 200, "{packages}");
    for line in packages.lines() {
        let (licence, package) = line.split_once('|').unwrap();
        assert!(allows(licence, &allowed), "{package} stands under {licence:?}, which is not in LICENCES");
        let name = package.split(' ').next().unwrap();
        assert!(!BANNED.contains(&name), "{name} is banned: see BANNED");
    }
}

#[test]
fn nothing_is_left_over() {
    let mut found = Vec::new();
    // In two parts, so that this file does not find itself.
    let markers = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("XX", "X"),
        concat!("todo", "!"),
        concat!("unimpl", "emented!"),
        concat!("db", "g!"),
        concat!("<<<<", "<<<"),
        concat!("breakpoint", "()"),
    ];
    let clone = root().to_string_lossy().into_owned();
    let homes = [concat!("/ho", "me/"), concat!("/ro", "ot/"), concat!("/Us", "ers/"), clone.as_str()];
    for path in files() {
        for (number, line) in read(&path).lines().enumerate() {
            let marker = markers.iter().find(|marker| names(line, marker));
            let home = homes.iter().find(|home| line.contains(**home));
            found.extend(marker.or(home).map(|what| format!("{path}:{}: {what}", number + 1)));
        }
    }
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn no_test_is_skipped_in_silence() {
    let swallowed = [concat!("println!(\"SKIP", "PED"), concat!("print!(\"SKIP", "PED")];
    for path in files().iter().filter(|path| is(path, "rs")) {
        let silent = read(path).lines().any(|line| swallowed.iter().any(|call| line.contains(call)));
        assert!(!silent, "{path}: the test runner swallows this skip: write it to `std::io::stderr()`");
    }
}

#[test]
fn files_are_short_enough_to_read() {
    let exceptions: BTreeMap<_, _> = LONG_FILES.into_iter().collect();
    let long = |path: &String| {
        let source = ["rs", "py", "toml"].iter().any(|extension| is(path, extension));
        source.then(|| read(path).lines().count()).filter(|lines| *lines > MOST_LINES)
    };
    let found: Vec<_> = files().into_iter().filter_map(|path| Some((long(&path)?, path))).collect();
    let unknown: Vec<_> = found.iter().filter(|(_, path)| !exceptions.contains_key(path.as_str())).collect();
    assert!(unknown.is_empty(), "more than {MOST_LINES} lines: {unknown:?}");
    assert_eq!(found.len(), exceptions.len(), "an exception is needed no more");
}

#[test]
fn engines_use_nothing_distributed_of_their_frameworks() {
    let mut num_files = 0;
    for path in files().iter().filter(|path| path.starts_with("python/hgct/") && is(path, "py")) {
        num_files += 1;
        for (number, line) in read(path).lines().enumerate() {
            let code = line.split('#').next().unwrap_or("");
            assert!(!code.contains("distributed"), "{path}:{}: {line}", number + 1);
        }
    }
    assert!(num_files > 5);
}

#[test]
fn data_files_parse() {
    let vendors = read("crates/hgct/src/vendors.rs");
    for path in files() {
        if is(&path, "toml") {
            let parsed: Result<toml::Table, _> = toml::from_str(&read(&path));
            assert!(parsed.is_ok(), "{path}: {}", parsed.unwrap_err());
        }
        if is(&path, "json") {
            let parsed: Result<Value, _> = serde_json::from_str(&read(&path));
            assert!(parsed.is_ok(), "{path}: {}", parsed.unwrap_err());
        }
        if path.starts_with("vendors/") {
            // Its own tests parse all that are built in.
            assert!(
                vendors.contains(&format!("\"{path}\"")) || vendors.contains(&format!("/{path}")),
                "{path} is not built in"
            );
        }
        if path.starts_with("examples/") && path.ends_with("job.toml") {
            let job = hgct_core::job::JobSpec::from_toml(&path, &read(&path)).unwrap();
            let config = Path::new(&path).with_file_name(&job.model.config);
            let config = config.to_str().unwrap();
            hgct_core::model::ModelSpec::from_config_json(config, &read(config)).unwrap();
        }
    }
}

#[test]
fn the_protocol_document_knows_every_message() {
    let source = read("crates/hgct-control/src/message.rs");
    let document = read("docs/protocol.md");
    let mut missing = Vec::new();
    for name in ["ToAgent", "FromAgent", "ToWorker", "FromWorker"] {
        let variants = variants(&source, name);
        assert!(variants.len() > 5, "{name}: {variants:?}");
        missing.extend(variants.into_iter().filter(|variant| !document.contains(&format!("`{variant}`"))));
    }
    assert!(missing.is_empty(), "docs/protocol.md does not mention {missing:?}");
}

#[test]
fn links_in_documents_lead_somewhere() {
    let mut num_links = 0;
    // A golden report's neighbours are written by a run.
    for path in files().iter().filter(|path| is(path, "md") && !path.contains("/golden/")) {
        let text = read(path);
        for part in text.split("](").skip(1) {
            let target = part.split([')', '#', ' ']).next().unwrap_or("");
            if target.is_empty() || target.contains("://") {
                continue;
            }
            let folder = Path::new(path).parent().unwrap();
            assert!(
                root().join(folder).join(target).exists(),
                "{path} links to {target}, which is not there"
            );
            num_links += 1;
        }
    }
    assert!(num_links > 10, "only {num_links} links were looked at");
}

#[test]
fn every_command_has_an_example_in_its_help() {
    let mut commands = Vec::new();
    let mut unseen = vec![Vec::new()];
    while let Some(command) = unseen.pop() {
        let help = help(&command);
        let children = subcommands(&help);
        if children.is_empty() {
            assert!(help.contains("Example"), "`hgct {} --help` has no example:\n{help}", command.join(" "));
            commands.push(command.join(" "));
        }
        unseen.extend(children.into_iter().map(|child| [command.clone(), vec![child]].concat()));
    }
    let readme = read("README.md");
    let undocumented: Vec<_> =
        commands.iter().filter(|command| !readme.contains(&format!("hgct {command}"))).collect();
    assert!(undocumented.is_empty(), "README.md does not mention {undocumented:?}");
    assert!(commands.len() > 7, "{commands:?}");
}

// ---- Helpers -------------------------------------------------------------------------------------

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// All files of the project that are text, as paths from the root.
fn files() -> Vec<String> {
    let mut found = Vec::new();
    let mut folders: Vec<PathBuf> = FOLDERS.iter().map(|name| root().join(name)).collect();
    let at_root = std::fs::read_dir(root()).unwrap().map(|entry| entry.unwrap().path());
    found.extend(at_root.filter(|path| path.is_file()));
    while let Some(folder) = folders.pop() {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        for path in entries.map(|entry| entry.unwrap().path()) {
            let name = path.file_name().unwrap().to_string_lossy();
            let built = ["__pycache__", "target"].contains(&&*name);
            match path.is_dir() {
                true if !built => folders.push(path),
                false if !is(&name, "so") && !is(&name, "pyc") => found.push(path),
                _ => {}
            }
        }
    }
    let root = root();
    let relative = |path: PathBuf| path.strip_prefix(&root).unwrap().to_string_lossy().into_owned();
    let mut paths: Vec<String> = found.into_iter().map(relative).collect();
    paths.retain(|path| std::fs::read_to_string(root.join(path)).is_ok());
    paths.sort();
    paths
}

fn is(path: &str, extension: &str) -> bool {
    Path::new(path).extension().is_some_and(|found| found == extension)
}

/// The numbered lines of a Rust file that are neither comments nor its tests.
fn code(text: &str) -> Vec<(usize, &str)> {
    let lines = text.lines().enumerate().map(|(number, line)| (number + 1, line));
    lines
        .take_while(|(_, line)| line.trim() != "#[cfg(test)]")
        .filter(|(_, line)| !line.trim_start().starts_with("//"))
        .collect()
}

/// Whether `line` has `word` with no letter, digit or `_` on either side.
fn names(line: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + word.len()..].chars().next();
        !(before.is_some_and(part) || word.ends_with(part) && after.is_some_and(part))
    })
}

/// Whether a licence expression has a choice that is allowed.
fn allows(expression: &str, licences: &[&str]) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let tokens: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    let allowed = either(&tokens, licences, &mut at);
    allowed && at == tokens.len()
}

fn either(tokens: &[&str], licences: &[&str], at: &mut usize) -> bool {
    let mut allowed = both(tokens, licences, at);
    while tokens.get(*at) == Some(&"OR") {
        *at += 1;
        allowed |= both(tokens, licences, at);
    }
    allowed
}

fn both(tokens: &[&str], licences: &[&str], at: &mut usize) -> bool {
    let mut allowed = one(tokens, licences, at);
    while tokens.get(*at) == Some(&"AND") {
        *at += 1;
        allowed &= one(tokens, licences, at);
    }
    allowed
}

fn one(tokens: &[&str], licences: &[&str], at: &mut usize) -> bool {
    if tokens.get(*at) == Some(&"(") {
        *at += 1;
        let allowed = either(tokens, licences, at);
        *at += 1;
        return allowed;
    }
    let mut name = tokens.get(*at).copied().unwrap_or_default().to_owned();
    *at += 1;
    if tokens.get(*at) == Some(&"WITH") {
        name = format!("{name} WITH {}", tokens.get(*at + 1).copied().unwrap_or_default());
        *at += 2;
    }
    licences.contains(&name.as_str())
}

/// What cargo knows of all packages that are built on this kind of host.
fn metadata() -> Value {
    let output = cargo()
        .args(["metadata", "--format-version", "1", "--offline", "--locked", "--filter-platform", &host()])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// This kind of host, as Rust names it.
fn host() -> String {
    let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    let version = String::from_utf8(rustc.arg("-vV").output().unwrap().stdout).unwrap();
    version.lines().find_map(|line| line.strip_prefix("host: ")).unwrap().to_owned()
}

/// Names of an enum's variants.
fn variants(source: &str, name: &str) -> Vec<String> {
    let begin = source.find(&format!("pub enum {name} {{")).unwrap_or_else(|| panic!("no enum {name}"));
    let body = &source[begin..];
    let body = &body[..body.find("\n}").unwrap()];
    let variant = |line: &str| {
        let line = line.strip_prefix("    ")?;
        let end = line.find(|c: char| !c.is_alphanumeric())?;
        line.starts_with(|c: char| c.is_ascii_uppercase()).then(|| line[..end].to_owned())
    };
    body.lines().filter_map(variant).collect()
}

fn help(command: &[String]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_hgct")).args(command).arg("--help").output().unwrap();
    assert!(output.status.success(), "`hgct {} --help` failed", command.join(" "));
    String::from_utf8(output.stdout).unwrap()
}

fn subcommands(help: &str) -> Vec<String> {
    let lines =
        help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let first_word = |line: &str| {
        let name = line.strip_prefix("  ")?.split(' ').next()?;
        (!name.is_empty() && name != "help").then(|| name.to_owned())
    };
    lines.filter_map(first_word).collect()
}
