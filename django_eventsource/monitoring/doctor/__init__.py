"""The findings of ``manage.py eventsource_doctor``.

A finding is a function with one job, which is listed in ``FINDINGS`` of its module: ``settings``
(this process), ``stores`` (the history's database or Redis servers) or ``path`` (what the canary
has observed on the way through the public URL). ``canary`` does not judge: it only measures.
"""
