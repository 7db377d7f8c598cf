//! Vendor files: all that hgct knows about a vendor, as data.
//!
//! A vendor file says how the vendor's hardware shows itself (driver, tool, library) and which
//! engines drive it. Those of `vendors/` are built in; files of a folder add to them or replace
//! the one of the same name. A kind is told by what stands here, never by a framework's device
//! string, since many vendors answer to `cuda`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use hgct_core::suggest;
use serde::{Deserialize, Serialize};

/// The files that are built into the binary, in the order in which they are tried.
const BUILT_IN: [(&str, &str); 15] = [
    ("vendors/cpu.toml", include_str!("../../../vendors/cpu.toml")),
    ("vendors/nvidia.toml", include_str!("../../../vendors/nvidia.toml")),
    ("vendors/amd.toml", include_str!("../../../vendors/amd.toml")),
    ("vendors/intel.toml", include_str!("../../../vendors/intel.toml")),
    ("vendors/apple.toml", include_str!("../../../vendors/apple.toml")),
    ("vendors/ascend.toml", include_str!("../../../vendors/ascend.toml")),
    ("vendors/biren.toml", include_str!("../../../vendors/biren.toml")),
    ("vendors/cambricon.toml", include_str!("../../../vendors/cambricon.toml")),
    ("vendors/moore-threads.toml", include_str!("../../../vendors/moore-threads.toml")),
    ("vendors/metax.toml", include_str!("../../../vendors/metax.toml")),
    ("vendors/iluvatar.toml", include_str!("../../../vendors/iluvatar.toml")),
    ("vendors/hygon.toml", include_str!("../../../vendors/hygon.toml")),
    ("vendors/kunlunxin.toml", include_str!("../../../vendors/kunlunxin.toml")),
    ("vendors/enflame.toml", include_str!("../../../vendors/enflame.toml")),
    ("vendors/vulkan.toml", include_str!("../../../vendors/vulkan.toml")),
];

/// Engines that a vendor file may name.
pub(crate) const ENGINES: [&str; 5] = ["torch", "jax", "paddle", "mlx", NATIVE];

/// The engine whose worker is a program of its own, without Python.
pub(crate) const NATIVE: &str = "burn";

/// What a column of a tool's output can hold.
const COLUMNS: [&str; 6] = ["index", "uuid", "pci", "name", "memory-mib", "driver"];

/// Result of this module.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

/// What can be wrong with vendor files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum Error {
    /// The folder or a file in it cannot be read.
    #[error("vendor files: {path} cannot be read")]
    Read {
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file does not parse, or a value is not allowed.
    #[error(transparent)]
    Document(#[from] hgct_core::Error),
}

/// One vendor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Vendor {
    /// Version of this document's form.
    format: u32,
    /// The name in kinds and documents: lower case, digits, `-`.
    pub(crate) name: String,
    /// The name for people.
    pub(crate) title: String,
    /// `never`, or what was verified on which hardware and when.
    pub(crate) verified: String,
    /// What else to know.
    #[serde(default)]
    pub(crate) notes: String,
    /// How its hardware shows itself.
    pub(crate) recognise: Recognition,
    /// What drives it; the first of a name is taken.
    #[serde(rename = "engine")]
    pub(crate) engines: Vec<EngineUse>,
}

/// How a vendor's hardware shows itself on a host. Paths may have `*`, `?` and `[…]`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Recognition {
    /// The hardware is the host's processor.
    pub(crate) processor: bool,
    /// The hardware is whatever adapters the engine's own worker lists, of any maker.
    pub(crate) adapters: bool,
    /// The kernel driver is loaded when one of these is there.
    pub(crate) driver_files: Vec<String>,
    /// It is another vendor's hardware when one of these is there.
    pub(crate) absent_files: Vec<String>,
    /// One file a card.
    pub(crate) card_files: Vec<String>,
    /// PCI vendor ids, four hex digits.
    pub(crate) pci_vendors: Vec<String>,
    /// Beginnings of PCI class codes, hex: display controllers and accelerators unless said otherwise.
    pub(crate) pci_classes: Vec<String>,
    /// Beginnings of the names of the vendor's libraries, one of which a process that drives a card
    /// has mapped.
    pub(crate) libraries: Vec<String>,
    /// Files that begin with the driver's version.
    pub(crate) version_files: Vec<String>,
    /// The vendor's tool.
    pub(crate) tool: Option<Tool>,
}

/// A vendor's command-line tool.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Tool {
    /// Program and arguments.
    pub(crate) command: Vec<String>,
    /// What the columns of its comma-separated lines hold, a line a card; empty: only its success
    /// counts.
    #[serde(default)]
    pub(crate) columns: Vec<String>,
    /// Where it may be, beside the search path.
    #[serde(default)]
    pub(crate) directories: Vec<String>,
}

/// How one engine drives a vendor's hardware.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct EngineUse {
    /// `torch`, `jax`, `paddle`, `mlx` or `burn`.
    pub(crate) engine: String,
    /// Python modules to import after the framework: the vendor's plug-in.
    #[serde(default)]
    pub(crate) imports: Vec<String>,
    /// The framework's device string; `{index}` is the card's number.
    pub(crate) device: String,
    /// Variable that says which cards a process sees.
    #[serde(default)]
    pub(crate) visibility: Option<String>,
    /// Variables of a worker's process, over those of its environment.
    #[serde(default)]
    pub(crate) variables: BTreeMap<String, String>,
    /// The library for collectives inside an island.
    #[serde(default)]
    pub(crate) collectives: Option<Collectives>,
    /// Operators to avoid.
    #[serde(default)]
    pub(crate) avoid: Vec<Avoid>,
    /// Weight of a stack when several share a processor.
    #[serde(default)]
    pub(crate) share: Option<f64>,
}

/// A vendor's collective library.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Collectives {
    /// Its name.
    pub(crate) library: String,
    /// The interface it speaks, such as `nccl`.
    pub(crate) abi: String,
}

/// An operator that is wrong or crashes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Avoid {
    /// Its name in the framework.
    pub(crate) operator: String,
    /// What was seen, on what, when.
    pub(crate) reason: String,
}

impl Vendor {
    /// How `engine` drives this vendor's hardware, if it does.
    pub(crate) fn engine(&self, engine: &str) -> Option<&EngineUse> {
        self.engines.iter().find(|driven| driven.engine == engine)
    }

    fn parse(file: &str, text: &str) -> Result<Self> {
        let vendor: Self = suggest::parse_toml(file, text)?;
        vendor.validate(file)?;
        Ok(vendor)
    }

    fn validate(&self, file: &str) -> Result<()> {
        if self.format != 1 {
            return Err(bad(file, "format", self.format, "1"));
        }
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if self.name.is_empty() || !self.name.chars().all(plain) {
            return Err(bad(file, "name", &self.name, "lower-case letters, digits and '-'"));
        }
        if self.verified.trim().is_empty() {
            return Err(bad(file, "verified", "empty", "\"never\", or what was verified and when"));
        }
        let found = &self.recognise;
        let signs = found.driver_files.len() + found.card_files.len() + found.pci_vendors.len();
        if signs == 0 && !found.processor && !found.adapters {
            return Err(bad(
                file,
                "recognise",
                "without any sign",
                "driver_files, card_files or pci_vendors",
            ));
        }
        for glob in found.driver_files.iter().chain(&found.card_files).chain(&found.absent_files) {
            if !glob.starts_with('/') {
                return Err(bad(file, "recognise.*_files", glob, "absolute paths"));
            }
        }
        let hex = |text: &str| text.chars().all(|c| c.is_ascii_digit() || ('a'..='f').contains(&c));
        if let Some(id) = found.pci_vendors.iter().find(|id| id.len() != 4 || !hex(id)) {
            return Err(bad(file, "recognise.pci_vendors", id, "four lower-case hex digits"));
        }
        if let Some(tool) = &found.tool {
            if tool.command.is_empty() {
                return Err(bad(file, "recognise.tool.command", "empty", "a program and its arguments"));
            }
            for column in &tool.columns {
                one_of(file, "recognise.tool.columns", column, &COLUMNS)?;
            }
        }
        if self.engines.is_empty() {
            return Err(bad(file, "engine", "missing", "at least one [[engine]]"));
        }
        for driven in &self.engines {
            one_of(file, "engine.engine", &driven.engine, &ENGINES)?;
            if driven.share.is_some_and(|share| !(share > 0.0 && share.is_finite())) {
                return Err(bad(file, "engine.share", "not positive", "a positive number"));
            }
        }
        Ok(())
    }
}

/// The built-in vendors, with the `*.toml` of `folder` in place of those of the same name or
/// after them.
pub(crate) fn load(folder: Option<&Path>) -> Result<Vec<Vendor>> {
    let mut vendors = Vec::new();
    for (file, text) in BUILT_IN {
        vendors.push(Vendor::parse(file, text)?);
    }
    let Some(folder) = folder else { return Ok(vendors) };
    let read_error = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::Read { path, source }
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(read_error(folder))? {
        let path = entry.map_err(read_error(folder))?.path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            files.push(path);
        }
    }
    files.sort();
    for path in files {
        let text = std::fs::read_to_string(&path).map_err(read_error(&path))?;
        let vendor = Vendor::parse(&path.display().to_string(), &text)?;
        match vendors.iter_mut().find(|known| known.name == vendor.name) {
            Some(known) => *known = vendor,
            None => vendors.push(vendor),
        }
    }
    Ok(vendors)
}

fn bad(file: &str, key: &str, found: impl std::fmt::Display, allowed: &str) -> Error {
    let (found, allowed) = (format!("{found}"), allowed.to_owned());
    hgct_core::Error::Value { file: file.into(), key: key.into(), found, allowed }.into()
}

fn one_of(file: &str, key: &str, found: &str, allowed: &[&str]) -> Result<()> {
    if allowed.contains(&found) {
        return Ok(());
    }
    let near = suggest::nearest(found, allowed.iter().copied());
    let hint = near.map_or_else(String::new, |near| format!(" (did you mean `{near}`?)"));
    Err(bad(file, key, format!("{found:?}"), &format!("one of {}{hint}", allowed.join(", "))))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = "format = 1\nname = \"x\"\ntitle = \"X\"\nverified = \"never\"\n\
        [recognise]\ndriver_files = [\"/dev/x\"]\n\
        [[engine]]\nengine = \"torch\"\ndevice = \"cuda:{index}\"\n";

    fn error(text: &str) -> String {
        Vendor::parse("x.toml", text).unwrap_err().to_string()
    }

    #[test]
    fn every_built_in_file_is_valid_and_named_like_its_vendor() {
        let vendors = load(None).unwrap();
        for (vendor, (file, _)) in vendors.iter().zip(BUILT_IN) {
            assert_eq!(format!("vendors/{}.toml", vendor.name), file);
        }
        assert_eq!(vendors.len(), 15);
        // Only what was seen may claim to be verified.
        let verified: Vec<_> = vendors.iter().filter(|v| v.verified != "never").map(|v| &v.name).collect();
        assert_eq!(verified, ["cpu", "vulkan"]);
    }

    #[test]
    fn several_vendors_answer_to_the_same_device_string() {
        let vendors = load(None).unwrap();
        let cuda = vendors.iter().filter(|v| v.engine("torch").is_some_and(|e| e.device == "cuda:{index}"));
        assert!(cuda.count() >= 5, "a device string must never be taken for a kind");
    }

    #[test]
    fn a_folder_replaces_by_name_and_adds() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a.toml"), SMALL.replace("\"x\"", "\"nvidia\"")).unwrap();
        std::fs::write(folder.path().join("b.toml"), SMALL).unwrap();
        std::fs::write(folder.path().join("note.txt"), "not a vendor").unwrap();
        let vendors = load(Some(folder.path())).unwrap();
        assert_eq!(vendors.len(), 16);
        assert_eq!(vendors[1].title, "X");
        assert_eq!(vendors[15].name, "x");
    }

    #[test]
    fn mistakes_are_named_with_what_was_meant() {
        assert_eq!(
            error(&SMALL.replace("verified", "verifed")),
            "x.toml, line 4: unknown key `verifed`: did you mean `verified`? (allowed: format, name, title, \
             verified, notes, recognise, engine)"
        );
        assert_eq!(
            error(&SMALL.replace("\"torch\"", "\"troch\"")),
            "x.toml: `engine.engine` is \"troch\", but must be one of torch, jax, paddle, mlx, burn (did you mean `torch`?)"
        );
        assert!(error(&SMALL.replace("/dev/x", "dev/x")).contains("absolute paths"));
        assert!(error(&SMALL.replace("format = 1", "format = 2")).contains("`format` is 2"));
        assert!(error("format = ").starts_with("x.toml, line 1:"));
        assert!(load(Some(Path::new("/nonexistent"))).unwrap_err().to_string().contains("/nonexistent"));
    }
}
