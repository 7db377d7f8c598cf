//! Rust crate sources as training text: every machine that built this program has them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::source::{Sources, walk};
use crate::{Error, Result};

/// Bytes of text that [`quickstart_sources`] aims at.
pub const TARGET_BYTES: u64 = 28 << 20;

/// Longest file in bytes; longer ones are mostly generated tables.
const MOST_FILE_BYTES: u64 = 128 << 10;

/// Longest mean line in bytes; files beyond are data in the form of code.
const MOST_MEAN_LINE_BYTES: u64 = 100;

/// A choice of Rust sources below cargo's `registry/src`: about `target_bytes`, spread over the
/// crates so that no crate has more than its even share, in the order of crate names and paths.
/// `packages` (see [`locked_packages`]) limits it to crates of one build, whatever else the machine
/// holds. Of a crate in several versions the newest counts. The same folder gives the same choice.
pub fn quickstart_sources(
    registry_src: &Path,
    packages: Option<&BTreeSet<String>>,
    target_bytes: u64,
) -> Result<Sources> {
    let mut files = Vec::new();
    for (_, folder) in crates(registry_src, packages)? {
        files.push(rust_files(&folder)?);
    }
    let sizes = files.iter().map(|files| files.iter().map(|(_, bytes)| bytes).sum()).collect();
    let cap = even_share(sizes, target_bytes);
    let mut chosen = Vec::new();
    for files in files {
        let mut left = cap;
        for (path, bytes) in files {
            if bytes <= left {
                left -= bytes;
                chosen.push(path);
            }
        }
    }
    if chosen.is_empty() {
        return Err(Error::NoCrates { path: registry_src.into() });
    }
    Ok(Sources::from_files(chosen))
}

/// The `name-version` of each package in a `Cargo.lock` that came from a registry.
pub fn locked_packages(cargo_lock: &Path) -> Result<BTreeSet<String>> {
    #[derive(Deserialize)]
    struct Lock {
        #[serde(default)]
        package: Vec<Package>,
    }
    #[derive(Deserialize)]
    struct Package {
        name: String,
        version: String,
        source: Option<String>,
    }
    let text = fs::read_to_string(cargo_lock).map_err(Error::io("read", cargo_lock))?;
    let lock: Lock = toml::from_str(&text).map_err(|error| Error::Option {
        key: "Cargo.lock",
        found: error.message().to_owned(),
        allowed: format!("what cargo writes ({})", cargo_lock.display()),
    })?;
    let registry = lock.package.into_iter().filter(|package| package.source.is_some());
    Ok(registry.map(|package| format!("{}-{}", package.name, package.version)).collect())
}

/// The newest folder of each crate, by name.
fn crates(registry_src: &Path, packages: Option<&BTreeSet<String>>) -> Result<BTreeMap<String, PathBuf>> {
    let mut newest: BTreeMap<String, (Vec<u64>, String, PathBuf)> = BTreeMap::new();
    if !registry_src.is_dir() {
        return Err(Error::NoCrates { path: registry_src.into() });
    }
    for index in folders(registry_src)? {
        for folder in folders(&index)? {
            let Some(name) = folder.file_name().and_then(|name| name.to_str()) else { continue };
            if packages.is_some_and(|packages| !packages.contains(name)) {
                continue;
            }
            let Some((name, version)) = split_version(name) else { continue };
            let numbers = version.split(['.', '-', '+']).map_while(|n| n.parse().ok()).collect();
            let found = (numbers, version.to_owned(), folder.clone());
            let best = newest.entry(name.to_owned()).or_insert_with(|| found.clone());
            if found > *best {
                *best = found;
            }
        }
    }
    Ok(newest.into_iter().map(|(name, (_, _, folder))| (name, folder)).collect())
}

/// `serde-json-1.0.1` into `serde-json` and `1.0.1`.
fn split_version(folder: &str) -> Option<(&str, &str)> {
    // A version has a dot before any further dash; a number in a name has none.
    let is_version = |rest: &str| {
        let numbers = rest.split(['-', '+']).next().unwrap_or("");
        numbers.contains('.') && numbers.starts_with(|c: char| c.is_ascii_digit())
    };
    let (at, _) = folder.match_indices('-').find(|(at, _)| is_version(&folder[at + 1..]))?;
    Some((&folder[..at], &folder[at + 1..]))
}

fn folders(parent: &Path) -> Result<Vec<PathBuf>> {
    let mut folders = Vec::new();
    for entry in fs::read_dir(parent).map_err(Error::io("list", parent))? {
        let path = entry.map_err(Error::io("list", parent))?.path();
        if path.is_dir() {
            folders.push(path);
        }
    }
    folders.sort_unstable();
    Ok(folders)
}

/// Rust files of one crate that read like text, with their sizes, sorted by path.
fn rust_files(folder: &Path) -> Result<Vec<(PathBuf, u64)>> {
    let mut files = Vec::new();
    for path in walk(folder)? {
        if path.extension().is_none_or(|extension| extension != "rs") {
            continue;
        }
        let bytes = fs::metadata(&path).map_err(Error::io("look at", &path))?.len();
        if bytes == 0 || bytes > MOST_FILE_BYTES {
            continue;
        }
        let content = fs::read(&path).map_err(Error::io("read", &path))?;
        let lines = content.split(|&byte| byte == b'\n').count() as u64;
        let is_text = !content.contains(&0) && std::str::from_utf8(&content).is_ok();
        if is_text && bytes / lines <= MOST_MEAN_LINE_BYTES {
            files.push((path, bytes));
        }
    }
    Ok(files)
}

/// The largest cap with which `sizes`, each cut at it, sum to at most `target`.
fn even_share(mut sizes: Vec<u64>, target: u64) -> u64 {
    sizes.sort_unstable();
    let mut left = target;
    for (i, &size) in sizes.iter().enumerate() {
        let share = left / (sizes.len() - i) as u64;
        if size > share {
            return share;
        }
        left -= size;
    }
    u64::MAX
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn registry(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = folder.path().join("index").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        folder
    }

    fn chosen(folder: &Path, packages: Option<&BTreeSet<String>>, target: u64) -> Vec<String> {
        let sources = quickstart_sources(folder, packages, target).unwrap();
        let root = folder.join("index");
        let name = |path: &Path| path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
        sources.files().iter().map(|file| name(&file.path)).collect()
    }

    #[test]
    fn the_newest_version_of_each_crate_is_chosen_up_to_its_share() {
        let long = "fn x() {}\n".repeat(100);
        let folder = registry(&[
            ("b-1.0.0/src/lib.rs", "fn b() {}\n"),
            ("a-b-0.9.0/src/lib.rs", "fn old() {}\n"),
            ("a-b-0.10.0/src/lib.rs", "fn new() {}\n"),
            ("a-b-0.10.0/src/big.rs", &long),
            ("a-b-0.10.0/src/empty.rs", ""),
            ("a-b-0.10.0/src/bin.rs", "\0"),
            ("a-b-0.10.0/README.md", "no"),
        ]);
        let all = ["a-b-0.10.0/src/big.rs", "a-b-0.10.0/src/lib.rs", "b-1.0.0/src/lib.rs"];
        assert_eq!(chosen(folder.path(), None, 10_000), all);
        assert_eq!(chosen(folder.path(), None, 100), all[1..]);
        let only = BTreeSet::from(["b-1.0.0".to_owned()]);
        assert_eq!(chosen(folder.path(), Some(&only), 10_000), all[2..]);
        let none = BTreeSet::new();
        let error = quickstart_sources(folder.path(), Some(&none), 1).unwrap_err();
        assert!(matches!(error, Error::NoCrates { .. }), "{error}");
        assert!(matches!(
            quickstart_sources(&folder.path().join("none"), None, 1),
            Err(Error::NoCrates { .. })
        ));
    }

    #[test]
    fn a_lock_file_names_the_packages_of_registries() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("Cargo.lock");
        let text = "version = 4\n[[package]]\nname = 'own'\nversion = '0.1.0'\n\
            [[package]]\nname = 'libc'\nversion = '0.2.1'\nsource = 'registry+x'\n";
        fs::write(&path, text).unwrap();
        assert_eq!(locked_packages(&path).unwrap(), BTreeSet::from(["libc-0.2.1".to_owned()]));
        fs::write(&path, "[[package]").unwrap();
        assert!(matches!(locked_packages(&path), Err(Error::Option { .. })));
    }

    #[test]
    fn a_name_may_look_like_a_version() {
        assert_eq!(split_version("sha-1-0.10.1"), Some(("sha-1", "0.10.1")));
        assert_eq!(split_version("libc-1.0.0-alpha.5"), Some(("libc", "1.0.0-alpha.5")));
        assert_eq!(split_version("toml-1.2.1+spec-1.1.0"), Some(("toml", "1.2.1+spec-1.1.0")));
        assert_eq!(split_version("noversion"), None);
    }

    proptest! {
        #[test]
        fn the_share_is_the_largest_that_fits(
            sizes in proptest::collection::vec(0u64..1000, 1..20),
            target in 0u64..9000,
        ) {
            let cap = even_share(sizes.clone(), target);
            let sum = |cap: u64| sizes.iter().map(|&size| size.min(cap)).sum::<u64>();
            prop_assert!(sum(cap) <= target);
            prop_assert!(cap == u64::MAX || sum(cap + 1) > target);
        }
    }
}
