//! The catalogue of accelerators: what is publicly known of a card, figure by figure, each with its
//! source and how far it can be trusted. A plan from these figures is an estimate with an interval;
//! a profile is what is measured.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::dtype::DType;
use crate::suggest::nearest;
use crate::{Error, Result};

/// How far a figure can be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Confidence {
    /// Nobody says so: taken from cards of its class.
    Estimate,
    /// Third parties say so, or the vendor elsewhere than in its data sheet.
    Reported,
    /// The vendor's data sheet.
    Vendor,
    /// Somebody measured it and published how.
    Measured,
}

/// One figure of an accelerator.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figure {
    /// The figure: the peak, for rates.
    pub value: f64,
    /// The part of it that a program was seen to reach, where that is published.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reached: Option<f64>,
    /// Lowest of the figures that sources give.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub low: Option<f64>,
    /// Highest of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub high: Option<f64>,
    /// Where it stands.
    pub source: String,
    /// How far it can be trusted.
    pub confidence: Confidence,
}

/// `accelerators/NAME.toml`: one accelerator.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Accelerator {
    /// Version of this document's form.
    pub format: u32,
    /// Its name in clusters and plans: lower case, digits, `-`.
    pub name: String,
    /// Its name for people.
    pub title: String,
    /// The vendor file that says how it is recognised and driven.
    pub vendor: String,
    /// Names under which drivers and frameworks show it.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// Memory, bytes.
    pub memory_bytes: Figure,
    /// Rate of its memory, bytes a second.
    pub memory_bytes_per_s: Figure,
    /// Rate to the other cards of its node, one way, bytes a second.
    pub link_bytes_per_s: Figure,
    /// Dense rate of matrix products by element type, floating-point operations a second.
    pub peak_flops_per_s: BTreeMap<DType, Figure>,
}

impl Figure {
    /// The figure as a whole number.
    pub fn whole(&self) -> u64 {
        self.value as u64
    }

    /// Lowest and highest of what sources give; a figure nobody disputes is its own range.
    pub fn range(&self) -> (f64, f64) {
        (self.low.unwrap_or(self.value).min(self.value), self.high.unwrap_or(self.value).max(self.value))
    }

    fn validate(&self, file: &str, key: &str) -> Result<()> {
        let bad = |field: &str, found: String, allowed: String| {
            Err(Error::Value { file: file.into(), key: format!("{key}.{field}"), found, allowed })
        };
        let positive = |x: f64| x.is_finite() && x > 0.0;
        for (field, value) in
            [("value", Some(self.value)), ("reached", self.reached), ("low", self.low), ("high", self.high)]
        {
            if let Some(value) = value.filter(|value| !positive(*value)) {
                return bad(field, value.to_string(), "a positive number".into());
            }
        }
        if self.reached.is_some_and(|reached| reached > self.value) {
            let found = self.reached.unwrap_or_default().to_string();
            return bad("reached", found, format!("at most value = {}", self.value));
        }
        let (low, high) = (self.low.unwrap_or(self.value), self.high.unwrap_or(self.value));
        if low > self.value || high < self.value {
            return bad("low, high", format!("{low} to {high}"), format!("around value = {}", self.value));
        }
        if self.source.trim().is_empty() {
            return bad("source", "empty".into(), "where the figure stands".into());
        }
        Ok(())
    }
}

impl Accelerator {
    /// The current form.
    pub const FORMAT: u32 = 1;

    /// Parses and validates an accelerator file; `file` is only named in errors.
    pub fn from_toml(file: &str, text: &str) -> Result<Self> {
        let accelerator: Self = crate::suggest::parse_toml(file, text)?;
        accelerator.validate(file)?;
        Ok(accelerator)
    }

    fn validate(&self, file: &str) -> Result<()> {
        let bad = |key: &str, found: String, allowed: &str| {
            Err(Error::Value { file: file.into(), key: key.into(), found, allowed: allowed.into() })
        };
        if self.format != Self::FORMAT {
            return bad("format", self.format.to_string(), "1");
        }
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        for (key, name) in [("name", &self.name), ("vendor", &self.vendor)] {
            if name.is_empty() || !name.chars().all(plain) {
                return bad(key, format!("{name:?}"), "lower-case letters, digits and '-'");
            }
        }
        if self.peak_flops_per_s.is_empty() {
            return bad("peak_flops_per_s", "empty".into(), "a rate of at least one element type");
        }
        self.memory_bytes.validate(file, "memory_bytes")?;
        self.memory_bytes_per_s.validate(file, "memory_bytes_per_s")?;
        self.link_bytes_per_s.validate(file, "link_bytes_per_s")?;
        for (dtype, figure) in &self.peak_flops_per_s {
            figure.validate(file, &format!("peak_flops_per_s.{dtype}"))?;
        }
        Ok(())
    }
}

/// Accelerators by name.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Catalogue {
    by_name: BTreeMap<String, Accelerator>,
}

impl Catalogue {
    /// Adds an accelerator, in place of the one of the same name.
    pub fn insert(&mut self, accelerator: Accelerator) {
        self.by_name.insert(accelerator.name.clone(), accelerator);
    }

    /// All of them, by name.
    pub fn iter(&self) -> impl Iterator<Item = &Accelerator> {
        self.by_name.values()
    }

    /// The accelerator of a name, or the one that a driver shows under it.
    pub fn get(&self, name: &str) -> Option<&Accelerator> {
        let alias = |row: &&Accelerator| row.aliases.iter().any(|alias| alias.eq_ignore_ascii_case(name));
        self.by_name.get(name).or_else(|| self.iter().find(alias))
    }

    /// The accelerator of a discovered kind, such as `nvidia-a100-sxm4-80gb/torch`: the one that has
    /// an alias all of whose words stand in it, the longest if several have.
    pub fn of_kind(&self, kind: &str) -> Option<&Accelerator> {
        let words = |text: &str| -> Vec<String> {
            let parts = text.split(|c: char| !c.is_ascii_alphanumeric()).filter(|part| !part.is_empty());
            parts.map(str::to_ascii_lowercase).collect()
        };
        let found = words(kind.split('/').next().unwrap_or(kind));
        let longest = |row: &Accelerator| {
            let known = row.aliases.iter().map(|alias| words(alias));
            known.filter(|alias| alias.iter().all(|word| found.contains(word))).map(|alias| alias.len()).max()
        };
        let matched = self.iter().filter_map(|row| Some((longest(row)?, row)));
        matched.max_by_key(|(length, _)| *length).map(|(_, row)| row)
    }

    /// The same as [`Catalogue::get`], with an error that suggests the nearest names; `file` and `key` say where the name
    /// stands.
    pub fn find(&self, file: &str, key: &str, name: &str) -> Result<&Accelerator> {
        self.get(name).ok_or_else(|| {
            let near = self.near(name);
            let hint = if near.is_empty() {
                format!("a name of the catalogue: {}", self.names())
            } else {
                format!("a name of the catalogue; near are {}", near.join(", "))
            };
            Error::Value { file: file.into(), key: key.into(), found: format!("{name:?}"), allowed: hint }
        })
    }

    /// Up to three names that may be meant.
    fn near(&self, name: &str) -> Vec<&str> {
        let lower = name.to_ascii_lowercase().replace([' ', '_'], "-");
        let related = |known: &&String| known.contains(&lower) || (known.len() > 2 && lower.contains(*known));
        let mut near: Vec<&str> = self.by_name.keys().filter(related).map(String::as_str).collect();
        let nearest = nearest(&lower, self.by_name.keys().map(String::as_str));
        near.extend(nearest.filter(|found| !near.contains(found)));
        near.truncate(3);
        near
    }

    fn names(&self) -> String {
        self.by_name.keys().cloned().collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = r#"
        format = 1
        name = "x1"
        title = "X 1"
        vendor = "x"
        aliases = ["Vendor X1"]
        memory_bytes = { value = 64e9, source = "s", confidence = "vendor" }
        memory_bytes_per_s = { value = 1e12, reached = 8e11, source = "s", confidence = "measured" }
        link_bytes_per_s = { value = 1e11, low = 5e10, high = 2e11, source = "s", confidence = "reported" }
        [peak_flops_per_s]
        bf16 = { value = 1e14, source = "s", confidence = "estimate" }
    "#;

    fn error(from: &str, to: &str) -> String {
        assert!(SMALL.contains(from));
        Accelerator::from_toml("x1.toml", &SMALL.replace(from, to)).unwrap_err().to_string()
    }

    #[test]
    fn a_file_is_read_with_its_figures() {
        let x = Accelerator::from_toml("x1.toml", SMALL).unwrap();
        assert_eq!(x.memory_bytes.whole(), 64_000_000_000);
        assert_eq!(x.link_bytes_per_s.range(), (5e10, 2e11));
        assert_eq!(x.peak_flops_per_s[&DType::Bf16].range(), (1e14, 1e14));
        assert!(x.memory_bytes.confidence < x.memory_bytes_per_s.confidence);
    }

    #[test]
    fn a_figure_must_be_possible_and_have_a_source() {
        assert!(
            error("value = 64e9", "value = 0").contains("`memory_bytes.value` is 0, but must be a positive")
        );
        assert!(error("reached = 8e11", "reached = 8e12").contains("at most value = 1000000000000"));
        assert!(error("low = 5e10", "low = 2e11").contains("around value"));
        assert!(
            error(r#"source = "s", confidence = "estimate""#, r#"source = "", confidence = "estimate""#)
                .contains("`peak_flops_per_s.bf16.source` is empty")
        );
        assert!(error(r#""vendor" }"#, r#""vedor" }"#).contains("unknown variant `vedor`"));
        assert!(error("bf16", "bf8").contains("line"));
        assert!(error("aliases", "alias").contains("did you mean `aliases`?"));
    }

    #[test]
    fn unknown_names_get_those_that_may_be_meant() {
        let mut catalogue = Catalogue::default();
        for name in ["a100-40", "a100-80", "h100", "mi300x"] {
            let text =
                SMALL.replace("\"x1\"", &format!("\"{name}\"")).replace("Vendor X1", &format!("V {name}"));
            catalogue.insert(Accelerator::from_toml("x", &text).unwrap());
        }
        assert_eq!(catalogue.get("V MI300X").unwrap().name, "mi300x");
        assert_eq!(catalogue.of_kind("v-a100-80-80gib/torch").unwrap().name, "a100-80");
        assert_eq!(catalogue.of_kind("amd-epyc-v/torch"), None);
        let error = |name: &str| catalogue.find("cluster.toml", "group.kind", name).unwrap_err().to_string();
        assert_eq!(
            error("a100"),
            "cluster.toml: `group.kind` is \"a100\", but must be a name of the catalogue; near are a100-40, a100-80, h100"
        );
        assert!(error("mi300").contains("near are mi300x"));
        assert!(error("abacus-nine").contains("catalogue: a100-40, a100-80, h100, mi300x"));
    }
}
