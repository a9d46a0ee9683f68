//! Properties of the scope that a bundle asks for by annotations, as under runc: `org.systemd.property.NAME`, whose value is in the text format of
//! GVariant. Of that there is what such properties take: booleans, numbers, strings and lists of strings.

use std::time::Duration;

use zbus::zvariant::Value;

/// How such an annotation begins.
const PREFIX: &str = "org.systemd.property.";

/// What is right, for whoever has written something else.
pub const RIGHT: &str = "give a property of systemd's its value in the text format of GVariant: a boolean, a number, a string or a list of \
                         strings, such as true, uint64 90000000, 'mixed' or ['a.service']";

/// The property that an annotation is for, if it is for one: its name and value, or nothing if that is not as it should be.
pub fn of(annotation: &str, text: &str) -> Option<Option<(String, Value<'static>)>> {
    let name = annotation.strip_prefix(PREFIX)?;
    Some(property(name, text))
}

fn property(name: &str, text: &str) -> Option<(String, Value<'static>)> {
    // As runc has them, which has this from the names that there are.
    if name.len() < 3 || !name.bytes().all(|byte| byte.is_ascii_alphabetic()) {
        return None;
    }
    let value = value(text)?;
    match name.strip_suffix("Sec") {
        // Some are documented so, and are microseconds over D-Bus.
        Some(stem) if stem.ends_with(|last: char| last.is_ascii_lowercase()) => {
            Some((format!("{stem}USec"), microseconds(&value)?.into()))
        }
        _ => Some((name.to_owned(), value)),
    }
}

fn microseconds(seconds: &Value<'_>) -> Option<u64> {
    let seconds = match *seconds {
        Value::U8(n) => n.into(),
        Value::U16(n) => n.into(),
        Value::U32(n) => n.into(),
        Value::U64(n) => n,
        Value::I16(n) => n.try_into().ok()?,
        Value::I32(n) => n.try_into().ok()?,
        Value::I64(n) => n.try_into().ok()?,
        Value::F64(n) => {
            let duration = Duration::try_from_secs_f64(n).ok()?;
            return duration.as_micros().try_into().ok();
        }
        _ => return None,
    };
    seconds.checked_mul(1_000_000)
}

fn value(text: &str) -> Option<Value<'static>> {
    let (typ, rest) = typed(text.trim())?;
    match rest.chars().next()? {
        '\'' | '"' if matches!(typ, "" | "s") => {
            let (string, rest) = string(rest)?;
            rest.is_empty().then(|| string.into())
        }
        '[' if matches!(typ, "" | "as") => {
            let strings = strings(rest)?;
            // Of what kind the members of an empty list are, somebody has to say.
            (typ == "as" || !strings.is_empty()).then(|| strings.into())
        }
        't' | 'f' if matches!(typ, "" | "b") => rest.parse::<bool>().ok().map(Value::from),
        '0'..='9' | '+' | '-' => number(typ, rest),
        _ => None,
    }
}

/// What is said of a value's type, as a signature of D-Bus, and the value.
fn typed(text: &str) -> Option<(&str, &str)> {
    const NAMES: [(&str, &str); 9] = [
        ("boolean", "b"),
        ("byte", "y"),
        ("int16", "n"),
        ("uint16", "q"),
        ("int32", "i"),
        ("uint32", "u"),
        ("int64", "x"),
        ("uint64", "t"),
        ("string", "s"),
    ];
    let (first, rest) = match text.split_once(char::is_whitespace) {
        Some((first, rest)) => (first, rest.trim_start()),
        None => (text, ""),
    };
    if let Some(signature) = first.strip_prefix('@') {
        return (!signature.is_empty()).then_some((signature, rest));
    }
    let named = NAMES.iter().find(|(name, _)| *name == first);
    Some(named.map_or(("", text), |(_, signature)| (*signature, rest)))
}

fn number(typ: &str, text: &str) -> Option<Value<'static>> {
    let is_hexadecimal = text.starts_with("0x");
    if matches!(typ, "" | "d") && !is_hexadecimal && (typ == "d" || text.contains(['.', 'e', 'E']))
    {
        return text.parse::<f64>().ok().map(Value::from);
    }
    let (digits, radix) = match text.strip_prefix("0x") {
        Some(digits) => (digits, 16),
        None if text.len() > 1 && text.starts_with('0') => (text, 8),
        None => (text, 10),
    };
    let number = i128::from_str_radix(digits, radix).ok()?;
    fn narrow<T: TryFrom<i128> + Into<Value<'static>>>(number: i128) -> Option<Value<'static>> {
        T::try_from(number).ok().map(Into::into)
    }
    match typ {
        "y" => narrow::<u8>(number),
        "n" => narrow::<i16>(number),
        "q" => narrow::<u16>(number),
        "" | "i" => narrow::<i32>(number),
        "u" => narrow::<u32>(number),
        "x" => narrow::<i64>(number),
        "t" => narrow::<u64>(number),
        _ => None,
    }
}

fn strings(text: &str) -> Option<Vec<String>> {
    let mut rest = text.strip_prefix('[')?.trim_start();
    let mut strings = Vec::new();
    if rest == "]" {
        return Some(strings);
    }
    loop {
        let (next, behind) = string(rest)?;
        strings.push(next);
        let behind = behind.trim_start();
        if behind == "]" {
            return Some(strings);
        }
        rest = behind.strip_prefix(',')?.trim_start();
    }
}

/// A string in quotes, and what is behind it.
fn string(text: &str) -> Option<(String, &str)> {
    let mut rest = text.chars();
    let quote = rest.next().filter(|first| matches!(first, '\'' | '"'))?;
    let mut string = String::new();
    loop {
        match rest.next()? {
            '\\' => match rest.next()? {
                'a' => string.push('\x07'),
                'b' => string.push('\x08'),
                'f' => string.push('\x0c'),
                'n' => string.push('\n'),
                'r' => string.push('\r'),
                't' => string.push('\t'),
                '\n' => {}
                'u' => string.push(code_point(&mut rest, 4)?),
                'U' => string.push(code_point(&mut rest, 8)?),
                other => string.push(other),
            },
            end if end == quote => return Some((string, rest.as_str())),
            other => string.push(other),
        }
    }
}

fn code_point(rest: &mut std::str::Chars<'_>, digits: usize) -> Option<char> {
    let text = rest.as_str().get(..digits)?;
    if !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    rest.nth(digits - 1);
    char::from_u32(u32::from_str_radix(text, 16).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_as_runc_reads_them() {
        let strings = |all: &[&str]| -> Value<'static> {
            Vec::from_iter(all.iter().map(|&one| one.to_owned())).into()
        };
        for (text, expected) in [
            ("true", Value::from(true)),
            (" boolean false ", false.into()),
            ("15", 15_i32.into()),
            ("-1", (-1_i32).into()),
            ("0x1f", 31_i32.into()),
            ("017", 15_i32.into()),
            ("0", 0_i32.into()),
            ("uint64 90000000", 90_000_000_u64.into()),
            ("@t 0xffffffffffffffff", u64::MAX.into()),
            ("byte 7", 7_u8.into()),
            ("int64\t-5", (-5_i64).into()),
            ("int16 -32768", i16::MIN.into()),
            ("uint16 65535", u16::MAX.into()),
            ("uint32 3", 3_u32.into()),
            ("int32 3", 3_i32.into()),
            ("1.5", 1.5.into()),
            ("@d 2", 2.0.into()),
            ("'mixed'", "mixed".into()),
            ("string \"it's\"", "it's".into()),
            (
                r"'a\'b\n\u00e4\U0001f512\\'",
                "a'b\n\u{e4}\u{1f512}\\".into(),
            ),
            (
                "['a.service',\"b\" , 'c']",
                strings(&["a.service", "b", "c"]),
            ),
            ("@as []", strings(&[])),
        ] {
            assert_eq!(value(text), Some(expected), "{text}");
        }
    }

    #[test]
    fn what_is_no_value_is_none() {
        for text in [
            "",
            "True",
            "truely",
            "mixed",
            "'mixed",
            "'a' 'b'",
            "'a\\",
            r"'\u12'",
            r"'\u+123'",
            r"'\ud800'",
            "uint64",
            "uint64 -1",
            "uint64 1.5",
            "uint128 1",
            "byte 256",
            "2147483648",
            "12 monkeys",
            "08",
            "0x",
            "string 5",
            "boolean 'true'",
            "uint32 uint32 5",
            "@ 5",
            "[]",
            "['a'",
            "['a',]",
            "['a' 'b']",
            "[1, 2]",
            "b'bytes'",
            "<5>",
            "{'a': 5}",
            "objectpath '/a'",
        ] {
            assert_eq!(value(text), None, "{text}");
        }
    }

    #[test]
    fn annotations_name_properties_and_seconds_become_microseconds() {
        let of = |name: &str, text| of(&format!("{PREFIX}{name}"), text).unwrap();
        let some = |name: &str, value: Value<'static>| Some((name.to_owned(), value));
        assert_eq!(of("KillSignal", "15"), some("KillSignal", 15_i32.into()));
        for (text, expected) in [
            ("uint64 5", 5_000_000_u64),
            ("5", 5_000_000),
            ("0.25", 250_000),
            ("byte 1", 1_000_000),
        ] {
            let expected = some("TimeoutStopUSec", expected.into());
            assert_eq!(of("TimeoutStopSec", text), expected, "{text}");
        }
        assert_eq!(
            of("TimeoutStopUSec", "uint64 5"),
            some("TimeoutStopUSec", 5_u64.into())
        );
        assert_eq!(of("Sec", "5"), some("Sec", 5_i32.into()));
        for (name, text) in [
            ("", "5"),
            ("Ab", "5"),
            ("Kill_Signal", "5"),
            ("Kill.Signal", "5"),
            ("KillSignal", "TERM"),
            ("TimeoutStopSec", "'5'"),
            ("TimeoutStopSec", "-5"),
            ("TimeoutStopSec", "uint64 0xffffffffffffffff"),
        ] {
            assert_eq!(of(name, text), None, "{name}");
        }
        assert_eq!(super::of("org.systemd.other", "5"), None);
    }
}
