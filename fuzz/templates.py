"""Chat templates that never end, take all memory, or reach for what is not theirs."""

from __future__ import annotations

from random import Random

HUGE = ("10**10", "2**31", "2**40", "10**8", "999999999999")
ENDLESS = (
    "{% for a in range(N) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for i in range(9999) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{{ 'a' * N }}", "{{ ('a' * 100000) * 100000 }}", "{{ [0] * N }}", "{{ [[0] * 9999] * N }}", "{{ 9 ** N }}",
    "{{ (9 ** 9) ** (9 ** 9) }}", "{{ '%Nd'|replace('N', N|string) % 1 }}", "{{ 'a'.ljust(N) }}", "{{ 'a'|center(N) }}",
    "{{ '{:>9999999999}'.format(1) }}", "{{ '%9999999999d' % 1 }}", "{{ '%9999999999d'|format(1) }}",
    "{{ 'a\n' * 9999 | indent(N) }}", "{{ lipsum(n=N) }}", "{{ range(N) | list }}",
    "{{ range(99999)|list|tojson(indent=N) }}",
    "{{ ('a' * 9999)|replace('a', 'a' * 9999)|replace('a', 'a' * 9999) }}", "{{ ('a ' * 30000)|wordwrap(1) * 99999 }}",
    "{{ messages[0]['content'] * N }}", "{% for m in messages * N %}{{ m['content'] }}{% endfor %}",
    "{{ ('a' * 99999)|list|batch(1)|list|string * N }}", "{{ (['a'] * 99999)|join('b' * 99999) }}",
    "{{ ('(' * 9999)|urlize }}", "{{ 'a'|slice(N)|list }}", "{{ cycler(*range(N)) }}", "{{ (1, ) * N == (1, ) * N }}",
)  # fmt: skip
REACHING = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].system('touch outside') }}",
    "{{ lipsum.__globals__['os'].popen('touch outside').read() }}",
    "{{ namespace.__init__.__globals__['__builtins__']['open']('outside', 'w') }}", "{{ messages.append(1) }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}", "{{ raise_exception.__globals__ }}",
    "{{ '%s'|attr('__class__') }}", "{{ messages|map(attribute='__class__')|list }}", "{% include '/etc/passwd' %}",
    "{% extends '../outside' %}", "{% import 'os' as os %}{{ os.system('touch outside') }}", "{{ messages.clear() }}",
    "{% set messages = [] %}", "{{ messages.pop() }}", "{{ strftime_now('%Y' * 99999) }}",
    "{{ messages[0].update(a=1) }}",
)  # fmt: skip
BROKEN = (
    "", "{{", "{% if %}", "{% for %}", "{{ 1 / 0 }}", "{{ x.y.z }}", "{{ messages[99] }}",
    "{{ raise_exception('no') }}",
    "{{ raise_exception() }}", "{{ None + 1 }}", "\0", "\ud800", "{{ '\ud800' }}", "{{ 'a'|nope }}", "{{ nope() }}",
    "{# " * 9999, "{{ " + "(" * 5000 + ")" * 5000 + " }}", "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "{{ " + "-" * 9999 + "1 }}",
    "{{ " + "[" * 150 + "]" * 150 + " }}", "{{ 'a'" + "|trim" * 5000 + " }}", "{{ a" + ".b" * 9999 + " }}", "x" * 10**6,
    "{% set x = 1 %}" * 20_000, "{{ bos_token }}" * 20_000, "{% generation %}{% endgeneration %}", "{% break %}",
    "{{ messages }}", "{{ messages|tojson }}", "{% for m in messages %}{{ m['content'][1:] }}{% endfor %}",
    "{% for m in messages %}{{ m['content']|upper }}{% endfor %}",
    "{% for m in messages %}{{ m['content'] * 3 }}{% endfor %}",
    "{% for m in messages|reverse %}{{ m['content'] }}{% endfor %}", "{% for m in messages %}{{ m.role }}{% endfor %}",
    "{{ bos_token * 3 }}{% for m in messages %}{{ m.content }}{% endfor %}", "{{ eos_token }}" * 50,
    "<start_of_turn>user\n" * 3, "{{ messages[0].content }}<bos><unk>\ufffd\U0010ffff",
    "{% macro caller() %}{% endmacro %}",
)  # fmt: skip
OTHER_TYPES = (
    None,
    1,
    True,
    [],
    {},
    [{"name": "default", "template": "{{ 'a' * 10**10 }}"}],
    [1],
    {"default": "{{"},
    [[]],
)


def hostile(rng: Random) -> str:
    """A template of one of the three kinds."""
    text = rng.choice(rng.choice((ENDLESS, ENDLESS, REACHING, BROKEN)))
    return text.replace("N", rng.choice(HUGE)) if text in ENDLESS else text
