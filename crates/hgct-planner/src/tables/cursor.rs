//! A JSON value that knows where it stands, so that an error can name file and key.

use hgct_core::Error;
use serde_json::{Map, Value};

use crate::Result;

/// A value with its place.
#[derive(Debug, Clone)]
pub(super) struct Cursor<'a> {
    file: &'a str,
    key: String,
    value: &'a Value,
}

impl<'a> Cursor<'a> {
    pub(super) fn root(file: &'a str, value: &'a Value) -> Self {
        Self { file, key: String::new(), value }
    }

    fn child(&self, key: &str, value: &'a Value) -> Self {
        let key = if self.key.is_empty() { key.to_owned() } else { format!("{}.{key}", self.key) };
        Self { file: self.file, key, value }
    }

    /// What is wrong with this value.
    pub(super) fn error(&self, found: impl Into<String>, allowed: impl Into<String>) -> crate::Error {
        crate::Error::Core(Error::Value {
            file: self.file.into(),
            key: if self.key.is_empty() { "(all of it)".into() } else { self.key.clone() },
            found: found.into(),
            allowed: allowed.into(),
        })
    }

    fn found(&self) -> String {
        match self.value {
            Value::Array(items) => format!("a list of {}", items.len()),
            Value::Object(_) => "an object".into(),
            other => {
                let text = other.to_string();
                if text.chars().count() > 60 { text.chars().take(60).chain(['…']).collect() } else { text }
            }
        }
    }

    fn map(&self) -> Result<&'a Map<String, Value>> {
        self.value.as_object().ok_or_else(|| self.error(self.found(), "an object"))
    }

    /// The value of a key that must be there.
    pub(super) fn get(&self, key: &str) -> Result<Self> {
        match self.map()?.get(key) {
            Some(value) => Ok(self.child(key, value)),
            None => Err(self.child(key, &Value::Null).error("missing", "there")),
        }
    }

    /// The value of a key, if it is there.
    pub(super) fn find(&self, key: &str) -> Option<Self> {
        self.value.get(key).map(|value| self.child(key, value))
    }

    /// All entries, at most `most`.
    pub(super) fn entries(&self, most: usize) -> Result<Vec<(&'a str, Self)>> {
        let map = self.map()?;
        if map.len() > most {
            return Err(self.error(format!("{} entries", map.len()), format!("at most {most}")));
        }
        Ok(map.iter().map(|(key, value)| (key.as_str(), self.child(key, value))).collect())
    }

    /// All entries of an object whose keys are numbers from `least`, ascending.
    pub(super) fn numbered(&self, least: u32, most: usize) -> Result<Vec<(u32, Self)>> {
        let mut rows = Vec::new();
        for (key, row) in self.entries(most)? {
            match key.parse::<u32>() {
                Ok(number) if (least..=1 << 20).contains(&number) => rows.push((number, row)),
                _ => return Err(row.error(format!("the key {key:?}"), format!("a number from {least}"))),
            }
        }
        rows.sort_by_key(|(number, _)| *number);
        Ok(rows)
    }

    /// The items of a list, at most `most`.
    pub(super) fn items(&self, most: usize) -> Result<Vec<Self>> {
        let items = self.value.as_array().ok_or_else(|| self.error(self.found(), "a list"))?;
        if items.len() > most {
            return Err(self.error(format!("a list of {}", items.len()), format!("at most {most} items")));
        }
        Ok(items.iter().enumerate().map(|(at, value)| self.child(&at.to_string(), value)).collect())
    }

    /// A list of exactly `N` numbers of any sign.
    pub(super) fn numbers<const N: usize>(&self) -> Result<[f64; N]> {
        let items = self.items(N.max(64))?;
        let mut numbers = [0.0; N];
        if items.len() != N {
            return Err(self.error(self.found(), format!("a list of {N} numbers")));
        }
        for (number, item) in numbers.iter_mut().zip(&items) {
            *number = match item.value.as_f64() {
                Some(x) if x.is_finite() => x,
                _ => return Err(item.error(item.found(), "a finite number")),
            };
        }
        Ok(numbers)
    }

    /// A number that is not negative.
    pub(super) fn amount(&self) -> Result<f64> {
        match self.value.as_f64() {
            Some(x) if x.is_finite() && x >= 0.0 => Ok(x),
            _ => Err(self.error(self.found(), "a number that is not negative")),
        }
    }

    /// A whole number from `least`.
    pub(super) fn count(&self, least: u32) -> Result<u32> {
        match self.value.as_u64().and_then(|x| u32::try_from(x).ok()) {
            Some(x) if x >= least => Ok(x),
            _ => Err(self.error(self.found(), format!("a whole number from {least}"))),
        }
    }

    /// A text that is not empty.
    pub(super) fn text(&self) -> Result<&'a str> {
        match self.value.as_str() {
            Some(text) if !text.is_empty() && text.len() <= 256 => Ok(text),
            _ => Err(self.error(self.found(), "a text of 1 to 256 bytes")),
        }
    }
}

/// Parses a JSON text of at most 64 MiB.
pub(super) fn parse(file: &str, text: &str) -> Result<Value> {
    const MOST: usize = 64 << 20;
    if text.len() > MOST {
        return Err(crate::Error::Core(Error::Syntax {
            file: file.into(),
            line: None,
            message: format!("{} bytes are more than the {MOST} that are read", text.len()),
        }));
    }
    Ok(hgct_core::canonical::decode(file, text)?)
}
