//! Numbers for people.

/// `12,345`.
pub(super) fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `12,345` of a rate.
pub(super) fn rate(value: f64) -> String {
    count(value.max(0.0).round() as u64)
}

/// `1.3M`, `950k`, `12`.
pub(super) fn short_count(value: u64) -> String {
    match value {
        1_000_000_000.. => format!("{:.1}B", value as f64 / 1e9),
        1_000_000.. => format!("{:.1}M", value as f64 / 1e6),
        10_000.. => format!("{:.0}k", value as f64 / 1e3),
        _ => count(value),
    }
}

/// `118 s`, `1.25 s`, `384 ms`, `42.1 ms`.
pub(super) fn seconds(value: f64) -> String {
    match value {
        v if v >= 100.0 => format!("{v:.0} s"),
        v if v >= 10.0 => format!("{v:.1} s"),
        v if v >= 1.0 => format!("{v:.2} s"),
        v if v >= 0.1 => format!("{:.0} ms", v * 1e3),
        v => format!("{:.1} ms", v * 1e3),
    }
}

/// `42.1 %`; one digit behind the point below ten.
pub(super) fn percent(share: f64) -> String {
    let value = share * 100.0;
    if value.abs() < 9.95 { format!("{value:.1} %") } else { format!("{value:.0} %") }
}

/// `412 MiB`, `1.5 GiB`.
pub(super) fn bytes(value: u64) -> String {
    let mib = value as f64 / f64::from(1 << 20);
    match mib {
        m if m >= 1024.0 => format!("{:.1} GiB", m / 1024.0),
        m if m >= 10.0 => format!("{m:.0} MiB"),
        m => format!("{m:.1} MiB"),
    }
}

/// A figure, or a dash where it is not known.
pub(super) fn or_dash<T>(value: Option<T>, show: impl FnOnce(T) -> String) -> String {
    value.map_or_else(|| "–".into(), show)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_as_people_write_them() {
        assert_eq!([count(0), count(999), count(1000), count(1_234_567)], ["0", "999", "1,000", "1,234,567"]);
        assert_eq!(
            [short_count(9_999), short_count(950_000), short_count(1_270_000)],
            ["9,999", "950k", "1.3M"]
        );
        assert_eq!([seconds(118.2), seconds(0.042_11), seconds(1.25)], ["118 s", "42.1 ms", "1.25 s"]);
        assert_eq!([percent(0.041), percent(0.954), percent(-0.004)], ["4.1 %", "95 %", "-0.4 %"]);
        assert_eq!([bytes(3 << 19), bytes(412 << 20), bytes(3 << 29)], ["1.5 MiB", "412 MiB", "1.5 GiB"]);
    }
}
