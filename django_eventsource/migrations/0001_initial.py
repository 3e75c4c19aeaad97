import django.db.models.deletion
from django.db import migrations, models

import django_eventsource.models


class Migration(migrations.Migration):

    initial = True

    dependencies = [
    ]

    operations = [
        migrations.CreateModel(
            name='PendingEvent',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('action', models.CharField(max_length=255, verbose_name='action')),
                ('data', models.BinaryField(verbose_name='data')),
                ('event_id', models.CharField(max_length=255, null=True, verbose_name='own id')),
                ('kind', models.CharField(max_length=6, verbose_name='kind')),
                ('created', models.DateTimeField(verbose_name='published')),
                ('idempotency_key', models.CharField(editable=False, max_length=32, null=True)),
                ('key', models.CharField(db_index=True, editable=False, max_length=32)),
                ('token', models.CharField(max_length=255, verbose_name='token')),
                ('ref', models.UUIDField(editable=False)),
            ],
            options={
                'verbose_name': 'pending event',
                'verbose_name_plural': 'pending events',
                'default_permissions': ('view',),
            },
        ),
        migrations.CreateModel(
            name='ProcessLease',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('key', models.CharField(editable=False, max_length=32, unique=True)),
                ('process', models.CharField(max_length=255, verbose_name='process')),
                ('until', models.DateTimeField(db_index=True, verbose_name='valid until')),
            ],
            options={
                'verbose_name': 'process',
                'verbose_name_plural': 'processes',
                'default_permissions': ('view',),
            },
        ),
        migrations.CreateModel(
            name='TokenHead',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('key', models.CharField(editable=False, max_length=32, unique=True)),
                ('token', models.CharField(max_length=255, verbose_name='token')),
                ('first', models.BigIntegerField(verbose_name='first sequence number')),
                ('kept', models.BigIntegerField(verbose_name='oldest sequence number kept')),
                ('last', models.BigIntegerField(verbose_name='last sequence number')),
                ('closed', models.BigIntegerField(null=True, verbose_name='sequence number of the last close')),
                ('start_offset', models.BigIntegerField(default=0, verbose_name='offset of the oldest event kept')),
                ('end_offset', models.BigIntegerField(default=0, verbose_name='offset of the end')),
                ('updated', models.DateTimeField(verbose_name='last published')),
            ],
            options={
                'verbose_name': 'token',
                'verbose_name_plural': 'tokens',
                'default_permissions': ('view',),
            },
        ),
        migrations.CreateModel(
            name='StoredEvent',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('action', models.CharField(max_length=255, verbose_name='action')),
                ('data', models.BinaryField(verbose_name='data')),
                ('event_id', models.CharField(max_length=255, null=True, verbose_name='own id')),
                ('kind', models.CharField(max_length=6, verbose_name='kind')),
                ('created', models.DateTimeField(verbose_name='published')),
                ('idempotency_key', models.CharField(editable=False, max_length=32, null=True)),
                ('seq', models.BigIntegerField(verbose_name='sequence number')),
                ('end_offset', models.BigIntegerField(verbose_name='offset of the end')),
                ('ref', models.UUIDField(editable=False, null=True)),
                ('head', models.ForeignKey(db_index=False, on_delete=django.db.models.deletion.DO_NOTHING, related_name='events', to='django_eventsource.tokenhead', verbose_name='token')),
            ],
            options={
                'verbose_name': 'stored event',
                'verbose_name_plural': 'stored events',
                'permissions': [('listen_event', 'Can listen to the events of every token'), ('send_event', 'Can send events to every token')],
                'default_permissions': ('view',),
                'indexes': [django_eventsource.models.NotNullIndex(fields=['head', 'event_id'], name='eventsource_event_id'), models.Index(fields=['created', 'head'], name='eventsource_created'), django_eventsource.models.NotNullIndex(fields=['head', 'idempotency_key'], name='eventsource_key')],
                'constraints': [models.UniqueConstraint(fields=('head', 'seq'), name='eventsource_head_seq')],
            },
        ),
        migrations.CreateModel(
            name='TokenPresence',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('key', models.CharField(db_index=True, editable=False, max_length=32)),
                ('token', models.CharField(max_length=255, verbose_name='token')),
                ('listeners', models.PositiveIntegerField(verbose_name='listeners')),
                ('identities', models.TextField(verbose_name='identities')),
                ('lease', models.ForeignKey(db_index=False, on_delete=django.db.models.deletion.DO_NOTHING, related_name='tokens', to='django_eventsource.processlease', verbose_name='process')),
            ],
            options={
                'verbose_name': 'presence',
                'verbose_name_plural': 'presences',
                'default_permissions': ('view',),
                'constraints': [models.UniqueConstraint(fields=('lease', 'key'), name='eventsource_lease_key')],
            },
        ),
        migrations.CreateModel(
            name='Console',
            fields=[
            ],
            options={
                'verbose_name': 'console',
                'verbose_name_plural': 'console',
                'permissions': [('close_streams', 'Can close the streams of every token and user')],
                'proxy': True,
                'default_permissions': ('view',),
                'indexes': [],
                'constraints': [],
            },
            bases=('django_eventsource.processlease',),
        ),
    ]
