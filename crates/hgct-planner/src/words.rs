//! Figures as people read them, the same wherever a plan is spoken of.

use std::fmt;

/// Four digits of a time in the unit that it is long in: `12.34 s`, `1.506 ms`, `84.21 µs`.
pub fn seconds(s: f64) -> String {
    let (value, unit) = match s.abs() {
        0.0 => return "0 s".into(),
        s if s >= 1.0 => (s, "s"),
        s if s >= 1e-3 => (s * 1e3, "ms"),
        s if s >= 1e-6 => (s * 1e6, "µs"),
        s => (s * 1e9, "ns"),
    };
    let digits = 3_usize.saturating_sub(value.max(1.0).log10() as usize);
    format!("{}{value:.digits$} {unit}", if s < 0.0 { "−" } else { "" })
}

/// [`seconds`] of nanoseconds.
pub fn nanoseconds(ns: u64) -> String {
    seconds(ns as f64 / 1e9)
}

/// Five digits of a rate, however small.
pub fn rate(per_s: f64) -> String {
    if !(per_s.is_finite() && per_s > 0.0) {
        return per_s.to_string();
    }
    let digits = (4.0 - per_s.log10().floor()).clamp(0.0, 12.0) as usize;
    format!("{per_s:.digits$}")
}

/// `1 micro-batch`, `2 micro-batches`, `3 devices`.
pub fn count(number: u64, of: &str) -> String {
    let ending = match of {
        _ if number == 1 => "",
        of if of.ends_with("ch") => "es",
        _ => "s",
    };
    format!("{number} {of}{ending}")
}

/// Layers from the first to before `end`, as `7` or `0–3`.
pub fn layers(first: u32, end: u32) -> String {
    let last = end.saturating_sub(1);
    if last <= first { first.to_string() } else { format!("{first}–{last}") }
}

/// Both ends of a range in one unit, or one where they read alike.
pub(crate) fn span(low: &str, high: &str) -> String {
    if low == high { low.to_owned() } else { format!("{low}–{high}") }
}

/// How many there are of a row that stands for several: ` ×12`, nothing for one.
pub(crate) fn times(number: usize) -> String {
    if number == 1 { String::new() } else { format!(" ×{number}") }
}

/// Lines up columns: the first two to the left, the others to the right.
pub(crate) fn table(f: &mut fmt::Formatter<'_>, rows: &[Vec<String>]) -> fmt::Result {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for row in rows {
        let mut line = String::from(" ");
        for (c, cell) in row.iter().enumerate() {
            let pad = " ".repeat(widths[c] - cell.chars().count());
            line.push(' ');
            if c < 2 {
                line.push_str(cell);
                line.push_str(&pad);
            } else {
                line.push_str(&pad);
                line.push_str(cell);
            }
            line.push(' ');
        }
        writeln!(f, "{}", line.trim_end())?;
    }
    Ok(())
}

pub(crate) fn cells<const N: usize>(row: [&str; N]) -> Vec<String> {
    row.iter().map(|s| (*s).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_read_well_at_any_size() {
        let times = [0.0, 123.456, 12.345, 0.0123, 0.000_123_4, 8.4e-9, -0.5].map(seconds);
        assert_eq!(times, ["0 s", "123.5 s", "12.35 s", "12.30 ms", "123.4 µs", "8.400 ns", "−500.0 ms"]);
        assert_eq!([1234.56, 12.0, 0.031_23, 0.0].map(rate), ["1234.6", "12.000", "0.031230", "0"]);
        assert_eq!([count(1, "micro-batch"), count(2, "micro-batch")], ["1 micro-batch", "2 micro-batches"]);
        assert_eq!([count(0, "device"), count(1, "pipeline")], ["0 devices", "1 pipeline"]);
        assert_eq!([layers(0, 4), layers(7, 8)], ["0–3", "7"]);
    }
}
