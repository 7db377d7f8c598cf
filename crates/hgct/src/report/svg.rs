//! What both pictures share: frame, colours for light and dark, scales.

use std::fmt::Write as _;

/// Colours and fonts; nothing is loaded from elsewhere.
const STYLE: &str = "\
text{font:12px system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;fill:#2b3240}
.bg{fill:#fff}.soft{fill:#6b7486}.strong{font-weight:600}.small{font-size:11px}
.grid{stroke:#e6e9ef;stroke-width:1}.axis{stroke:#b4bbc8;stroke-width:1}.lane{fill:#eef0f4}
.line{fill:none;stroke-linejoin:round;stroke-linecap:round}.dash{stroke-dasharray:5 4}
.s1{stroke:#2563c9}.s2{stroke:#d2570b}.s3{stroke:#7a8394}.f1{fill:#2563c9}.f2{fill:#d2570b}.f3{fill:#5e6778}
.F{fill:#4c8bf0}.B{fill:#1f4fa3}.X{fill:#e2902a}.Y{fill:#f6dcb5}.T{fill:#2e9e78}
@media (prefers-color-scheme:dark){
text{fill:#dfe4ee}.bg{fill:#12161d}.soft{fill:#98a2b5}
.grid{stroke:#262d39}.axis{stroke:#4a5366}.lane{fill:#1f2631}
.s1{stroke:#6ea8ff}.s2{stroke:#ff9a52}.s3{stroke:#8d97aa}.f1{fill:#6ea8ff}.f2{fill:#ff9a52}.f3{fill:#a4aec0}
.F{fill:#7db1ff}.B{fill:#3f76d8}.X{fill:#f0a94a}.Y{fill:#5e4727}.T{fill:#46c89b}
}";

/// A picture with its words for those who do not see it.
pub(super) fn picture(width: f64, height: f64, title: &str, description: &str, body: &str) -> String {
    let (w, h) = (number(width), number(height));
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{w}\" height=\"{h}\" viewBox=\"0 0 {w} {h}\" role=\"img\" \
         aria-labelledby=\"title desc\">\n<title id=\"title\">{}</title>\n<desc id=\"desc\">{}</desc>\n\
         <style>\n{STYLE}\n</style>\n<rect class=\"bg\" width=\"{w}\" height=\"{h}\" rx=\"8\"/>\n{body}</svg>\n",
        escape(title),
        escape(description)
    )
}

/// A line of text; `anchor` is `start`, `middle` or `end`.
pub(super) fn text(body: &mut String, x: f64, y: f64, anchor: &str, class: &str, text: &str) {
    let class = if class.is_empty() { String::new() } else { format!(" class=\"{class}\"") };
    let anchor = if anchor == "start" { String::new() } else { format!(" text-anchor=\"{anchor}\"") };
    let _ = writeln!(
        body,
        "<text x=\"{}\" y=\"{}\"{anchor}{class}>{}</text>",
        number(x),
        number(y),
        escape(text)
    );
}

/// A straight line.
pub(super) fn line(body: &mut String, class: &str, from: (f64, f64), to: (f64, f64)) {
    let _ = writeln!(
        body,
        "<path class=\"{class}\" d=\"M{} {}L{} {}\"/>",
        number(from.0),
        number(from.1),
        number(to.0),
        number(to.1)
    );
}

/// A rectangle.
pub(super) fn rect(body: &mut String, class: &str, x: f64, y: f64, width: f64, height: f64) {
    let [x, y, w, h] = [x, y, width, height].map(number);
    let _ =
        writeln!(body, "<rect class=\"{class}\" x=\"{x}\" y=\"{y}\" width=\"{w}\" height=\"{h}\" rx=\"2\"/>");
}

/// Text inside of an element.
pub(super) fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            // XML 1.0 has no other control characters, not even escaped.
            c if c.is_control() => safe.push(' '),
            c => safe.push(c),
        }
    }
    safe
}

/// A coordinate to a tenth, as short as it goes.
pub(super) fn number(value: f64) -> String {
    let text = format!("{value:.1}");
    let text = text.strip_suffix(".0").unwrap_or(&text);
    if text == "-0" { "0".into() } else { text.into() }
}

/// Round values from `low` to `high`, about `about` of them.
pub(super) fn ticks(low: f64, high: f64, about: f64) -> Vec<f64> {
    let span = high - low;
    if !span.is_finite() || span <= 0.0 {
        return vec![low];
    }
    let raw = span / about;
    let power = 10f64.powf(raw.log10().floor());
    let step =
        [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|step| *step >= raw * 0.999).unwrap_or(raw);
    let (first, last) = ((low / step - 1e-9).ceil() as i64, (high / step + 1e-9).floor() as i64);
    (first..=last).map(|i| i as f64 * step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ticks_are_few_round_and_inside(low in -1e6f64..1e6, span in 1e-6f64..1e6) {
            let found = ticks(low, low + span, 5.0);
            prop_assert!(found.len() <= 8, "{:?}", found);
            prop_assert!(found.iter().all(|t| *t >= low - span * 1e-3 && *t <= low + span * 1.001));
        }
    }

    #[test]
    fn text_cannot_leave_its_element() {
        assert_eq!(escape("a<b>&\"\u{1}"), "a&lt;b&gt;&amp;&quot; ");
        assert_eq!([number(-0.01), number(1.25), number(3.0)], ["0", "1.2", "3"]);
    }
}
