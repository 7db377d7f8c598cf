//! Typed documents from TOML, with the nearest key suggested for an unknown one.

use serde::Deserialize;

use crate::{Error, Result};

/// The candidate nearest to `found`, if it is near enough to be meant (a third of its length).
pub fn nearest<'a>(found: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|candidate| (edit_distance(found, candidate), candidate))
        .min()
        .filter(|(distance, candidate)| *distance <= candidate.len().max(found.len()).div_ceil(3))
        .map(|(_, candidate)| candidate)
}

/// Parses a TOML document whose types deny unknown fields.
pub fn parse_toml<T: for<'de> Deserialize<'de>>(file: &str, text: &str) -> Result<T> {
    toml::from_str(text).map_err(|error| {
        let line = error.span().map(|span| 1 + text[..span.start.min(text.len())].matches('\n').count());
        let message = error.message().to_owned();
        unknown_key(file, line, &message).unwrap_or(Error::Syntax { file: file.into(), line, message })
    })
}

/// Reads serde's "unknown field `x`, expected one of `a`, `b`" into a typed error.
fn unknown_key(file: &str, line: Option<usize>, message: &str) -> Option<Error> {
    let rest = message.strip_prefix("unknown field `")?;
    let (key, rest) = rest.split_once('`')?;
    let allowed: Vec<&str> = rest.split('`').skip(1).step_by(2).collect();
    Some(Error::UnknownKey {
        file: line.map_or_else(|| file.into(), |line| format!("{file}, line {line}")),
        key: key.into(),
        suggestion: nearest(key, allowed.iter().copied()).map(Into::into),
        allowed: allowed.join(", "),
    })
}

/// Levenshtein distance in characters.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize, Debug)]
    #[serde(deny_unknown_fields)]
    struct Recipe {
        #[allow(dead_code, reason = "only its name matters here")]
        steps: u32,
    }

    #[test]
    fn an_unknown_key_names_line_and_nearest() {
        let error = parse_toml::<Recipe>("job.toml", "# hi\nstpes = 3\n").unwrap_err();
        assert_eq!(
            error.to_string(),
            "job.toml, line 2: unknown key `stpes`: did you mean `steps`? (allowed: steps)"
        );
    }

    #[test]
    fn far_names_are_not_suggested() {
        assert_eq!(nearest("zebra", ["steps", "seed"]), None);
        assert_eq!(nearest("sed", ["steps", "seed"]), Some("seed"));
    }
}
