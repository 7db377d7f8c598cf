//! The catalogue of accelerators: built in from `accelerators/`, replaced or extended by the files
//! of a folder.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use hgct_core::accelerator::{Accelerator, Catalogue};

use crate::vendors;

/// Every file of `accelerators/` with its text; the build lists them.
const BUILT_IN: &[(&str, &str)] = &include!(concat!(env!("OUT_DIR"), "/accelerators.rs"));

/// The built-in accelerators, with the `*.toml` of `folder` in place of those of the same name or
/// beside them.
pub(crate) fn load(folder: Option<&Path>) -> Result<Catalogue> {
    let mut catalogue = Catalogue::default();
    for (file, text) in BUILT_IN {
        catalogue.insert(Accelerator::from_toml(file, text)?);
    }
    let Some(folder) = folder else { return Ok(catalogue) };
    let read = |path: &Path| format!("accelerator files: cannot read {}", path.display());
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| read(folder))? {
        files.push(entry.with_context(|| read(folder))?.path());
    }
    files.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    files.sort();
    let vendors = vendors::load(None)?;
    for path in files {
        let text = std::fs::read_to_string(&path).with_context(|| read(&path))?;
        let accelerator = Accelerator::from_toml(&path.to_string_lossy(), &text)?;
        if !vendors.iter().any(|vendor| vendor.name == accelerator.vendor) {
            let known: Vec<&str> = vendors.iter().map(|vendor| vendor.name.as_str()).collect();
            bail!(
                "{}: `vendor` is {:?}, but must be one with a vendor file: {}",
                path.display(),
                accelerator.vendor,
                known.join(", ")
            );
        }
        catalogue.insert(accelerator);
    }
    Ok(catalogue)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A card nobody has built, in the form of a built-in file.
    const ADDED: &str = r#"format = 1
name = "nova-9"
title = "Nova 9"
vendor = "nvidia"
memory_bytes = { value = 137438953472, source = "a test", confidence = "estimate" }
memory_bytes_per_s = { value = 2e12, source = "a test", confidence = "estimate" }
link_bytes_per_s = { value = 1e11, source = "a test", confidence = "estimate" }

[peak_flops_per_s]
bf16 = { value = 5e14, source = "a test", confidence = "estimate" }
"#;

    #[test]
    fn every_built_in_accelerator_is_short_sourced_and_of_a_known_vendor() {
        let (catalogue, vendors) = (load(None).unwrap(), vendors::load(None).unwrap());
        assert!(BUILT_IN.len() >= 25, "only {}", BUILT_IN.len());
        assert_eq!(catalogue.iter().count(), BUILT_IN.len());
        for (file, text) in BUILT_IN {
            let accelerator = Accelerator::from_toml(file, text).unwrap();
            assert_eq!(*file, format!("accelerators/{}.toml", accelerator.name));
            assert!(text.lines().count() < 20, "{file} is too long");
            assert!(
                vendors.iter().any(|vendor| vendor.name == accelerator.vendor),
                "{file}: no vendor file {}",
                accelerator.vendor
            );
            for alias in &accelerator.aliases {
                assert_eq!(catalogue.get(alias).map(|found| &found.name), Some(&accelerator.name), "{alias}");
            }
        }
    }

    #[test]
    fn an_accelerator_is_added_by_a_file_alone() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("nova-9.toml"), ADDED).unwrap();
        std::fs::write(folder.path().join("t4.toml"), ADDED.replace("nova-9", "t4")).unwrap();
        std::fs::write(folder.path().join("notes.md"), "not an accelerator").unwrap();
        let catalogue = load(Some(folder.path())).unwrap();
        assert_eq!(catalogue.iter().count(), BUILT_IN.len() + 1);
        assert_eq!(catalogue.get("nova-9").unwrap().memory_bytes.whole(), 128 << 30);
        assert_eq!(catalogue.get("t4").unwrap().title, "Nova 9");
        assert!(ADDED.lines().count() < 20);
    }

    #[test]
    fn a_folder_with_a_mistake_is_told_where() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("x.toml"), ADDED.replace("\"nvidia\"", "\"nobody\"")).unwrap();
        let error = load(Some(folder.path())).unwrap_err().to_string();
        assert!(
            error.contains("x.toml") && error.contains("\"nobody\"") && error.contains("biren"),
            "{error}"
        );
        let missing = format!("{:#}", load(Some(Path::new("/nonexistent"))).unwrap_err());
        assert!(missing.contains("/nonexistent"), "{missing}");
    }
}
